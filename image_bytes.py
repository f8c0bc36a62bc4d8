"""An encoded face of a .rec or .bin set: what its header says, and its pixels."""

import struct

import cv2

IMAGE_SHAPE = (112, 112, 3)
_MOST_BYTES = 1 << 20  # the pixels are 37,632 bytes; a JPEG of this size may ask for 100,000 passes over them
_MOST_SEGMENTS = 1000  # before the one that says the size; a photograph with all its metadata has some dozens
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_BEGIN = _PNG_SIGNATURE + b"\0\0\0\rIHDR"
_CHUNK = struct.Struct(">I4s")  # length and kind; the contents and four bytes of checksum follow
_WIDTH_HEIGHT, _HEIGHT_WIDTH = struct.Struct(">II"), struct.Struct(">HH")
_SIZED_SEGMENTS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOF0 ... SOF15 of ITU-T T.81, table B.1
_SKIPPED_SEGMENTS = frozenset({0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE})  # DHT DAC DQT DRI APPn COM


def image_size(data):
    """`(width, height)` by the header of a JPEG or PNG; None for bytes that begin as neither.

    data: bytes, or a uint8 array. Nothing is decoded: a header costs a few microseconds, whatever it announces.
    """
    view = memoryview(data)
    if len(view) >= 24 and view[:16] == _PNG_BEGIN:
        return _WIDTH_HEIGHT.unpack_from(view, 16)
    return _jpeg_size(view) if view[:2] == b"\xff\xd8" else None


def _jpeg_size(view):
    """Walks the segments as strictly as the decoder, so that both come to the same one; None for any other order."""
    at = 2
    for _ in range(_MOST_SEGMENTS):
        if at + 9 > len(view) or view[at] != 0xFF:
            return None
        marker = view[at + 1]
        if marker in _SIZED_SEGMENTS:
            return _HEIGHT_WIDTH.unpack_from(view, at + 5)[::-1]
        if marker in _SKIPPED_SEGMENTS:
            at += 2 + (view[at + 2] << 8 | view[at + 3])
        elif marker == 0xFF:  # a fill byte
            at += 1
        else:
            return None
    return None


def decode_bgr(data):
    """Decode a JPEG or PNG, a uint8 array: [112, 112, 3], in OpenCV's order of channels.

    Raises `ValueError` for bytes that are not a whole image (OpenCV alone would fill the missing end of a JPEG with
    grey), are more than 1 MiB or, before their pixels are reserved, announce another size.
    """
    if len(data) > _MOST_BYTES:
        raise ValueError(f"its {len(data)} bytes are too many for 112 x 112 pixels: align the faces first")
    size = image_size(data)
    if size is not None and size != IMAGE_SHAPE[1::-1]:
        raise ValueError(f"image is {size[0]} x {size[1]}, not 112 x 112: align the faces first")
    whole = whole_image(data) if size else None
    try:
        image = cv2.imdecode(whole, cv2.IMREAD_COLOR) if whole is not None else None
    except cv2.error:
        image = None
    if image is None or image.shape != IMAGE_SHAPE:
        raise ValueError(f"its {len(data)} bytes do not decode as an image")
    return image


def whole_image(data):
    """`data`, a JPEG or PNG, without what follows a PNG's last chunk; None if a JPEG's end marker or that chunk lacks.

    A JPEG's scan data cannot hold the marker: 0xff is always followed by a zero or a restart number. OpenCV reserves
    what a PNG's chunk announces, up to 2 GB, and fills it, before it finds that the file is shorter; and it looks for
    chunks behind the last one.
    """
    if data[0] == 0xFF:
        return data if b"\xff\xd9" in data[-64:].tobytes() or b"\xff\xd9" in data.tobytes() else None
    view, at = memoryview(data), len(_PNG_SIGNATURE)
    while at + 12 <= len(view):
        length, kind = _CHUNK.unpack_from(view, at)
        at += 12 + length
        if kind == b"IEND":
            return data[:at] if at <= len(view) else None
    return None
