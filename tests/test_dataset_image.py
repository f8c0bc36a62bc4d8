"""Encoded faces: header and pixels, and what must not reach the decoder."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies

import dataset
from dataset import decode_bgr, image_size, whole_image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def picture(height=112, width=112):
    rng = np.random.default_rng(height * 1000 + width)
    return cv2.resize(rng.integers(0, 256, (5, 6, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(kind, image, *options):
    return cv2.imencode(kind, image, list(options))[1].tobytes()


def decoded(data):
    return decode_bgr(np.frombuffer(data, np.uint8))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height):
    return SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def with_size(jpeg, width, height):
    """The JPEG with another size in its header."""
    at = next(i for i in range(len(jpeg)) if jpeg[i] == 0xFF and jpeg[i + 1] in (0xC0, 0xC2))
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


JPEG, PNG = encoded(".jpg", picture()), encoded(".png", picture())
PROGRESSIVE = encoded(".jpg", picture(), cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 3)


@pytest.fixture
def no_decoder(monkeypatch):
    """OpenCV's decoder must not see the image."""

    def refuse(*_):
        raise AssertionError("was decoded")

    monkeypatch.setattr(dataset.cv2, "imdecode", refuse)


@pytest.mark.parametrize("height, width", [(112, 112), (1, 1), (250, 130), (96, 112), (300, 1000)])
@pytest.mark.parametrize(
    "kind, options",
    [
        (".jpg", ()),
        (".jpg", (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)),
        (".jpg", (cv2.IMWRITE_JPEG_RST_INTERVAL, 2)),
        (".jpg", (cv2.IMWRITE_JPEG_OPTIMIZE, 1, cv2.IMWRITE_JPEG_QUALITY, 5)),
        (".png", ()),
        (".png", (cv2.IMWRITE_PNG_COMPRESSION, 1)),
    ],
)
def test_header_and_decoder_agree(height, width, kind, options):
    for image in (picture(height, width), picture(height, width)[..., 0]):
        data = encoded(kind, image, *options)
        assert image_size(data) == image_size(np.frombuffer(data, np.uint8)) == (width, height)
        if (height, width) == (112, 112):
            assert np.array_equal(decoded(data), cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))
        else:
            with pytest.raises(ValueError, match=f"^image is {width} x {height}, not 112 x 112: align the faces"):
                decoded(data)


def test_segments_before_the_size_are_skipped():
    comment, fill = b"\xff\xfe\x00\x0bcomment\xff\xc0", b"\xff" * 5  # a comment that looks like a header
    data = JPEG[:2] + comment[:4] + b"\xff\xc0\0\x11\x08\0\1\0\1" + fill + JPEG[2:]
    assert image_size(data) == (112, 112) and np.array_equal(decoded(data), decoded(JPEG))


@pytest.mark.parametrize("width, height", [(60000, 60000), (65535, 65535), (2**31 - 1, 1), (113, 112), (112, 0)])
def test_a_giant_header_is_refused_before_it_is_decoded(width, height, no_decoder):
    images = [png_header(width, height) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")]
    images += [with_size(data, width, height) for data in (JPEG, PROGRESSIVE) if width < 2**16]
    for data in images:
        with pytest.raises(ValueError, match=f"image is {width} x {height}, not 112 x 112"):
            decoded(data)


def test_a_chunk_longer_than_its_file_is_refused_before_it_is_decoded(no_decoder):
    """OpenCV would allocate the declared length."""
    for kind in (b"tEXt", b"IDAT", b"IEND"):
        for rest in (b"", bytes(100), PNG[len(png_header(1, 1)) :]):
            with pytest.raises(ValueError, match="do not decode"):
                decoded(png_header(112, 112) + struct.pack(">I", 2**31 - 1) + kind + rest)


def test_data_after_the_end_of_a_png_is_ignored():
    """OpenCV would allocate 600 MB for the chunk, which it reads if no image came before the end."""
    behind = struct.pack(">I", 2**29) + b"tEXt" + bytes(100)
    assert np.array_equal(decoded(PNG + behind), picture())
    empty = png_header(112, 112) + chunk(b"IEND", b"")
    assert whole_image(np.frombuffer(empty + behind, np.uint8)).tobytes() == empty
    with pytest.raises(ValueError, match="do not decode"):
        decoded(empty + behind)


def test_other_formats_and_bytes_are_refused_before_they_are_decoded(no_decoder):
    others = [encoded(kind, picture()) for kind in (".bmp", ".tiff", ".webp", ".ppm", ".jp2")]
    scan = b"\xff\xda" + JPEG.split(b"\xff\xda")[1]
    endless = JPEG[:2] + b"\xff\xfe\x00\x02" * 2000 + JPEG[2:]
    for data in [
        *others,
        b"",
        b"\xff",
        b"\xff\xd8",
        b"\xff\xd8\xff",
        SIGNATURE,
        PNG[:23],
        JPEG[:30],
        JPEG[:2] + scan,
        JPEG[:2] + b"\xff\xd8" + JPEG[2:],
        JPEG[:-2],
        PROGRESSIVE[:-40],
        PNG[:-1],
        PNG[:-12],
        endless,
    ]:
        with pytest.raises(ValueError, match=f"^{len(data)} bytes that do not decode as an image$"):
            decoded(data)


def test_too_many_bytes_are_refused_before_they_are_decoded(no_decoder):
    scan = PROGRESSIVE[PROGRESSIVE.rfind(b"\xff\xda") : -2]  # each such scan is a pass over the whole image
    with pytest.raises(ValueError, match="bytes are too many for 112 x 112 pixels"):
        decoded(PROGRESSIVE[:-2] + scan * (2**20 // len(scan)) + b"\xff\xd9")


def cuts_and_changes():
    """Whole images with a few bytes changed, and stretches left out or doubled."""

    def change(case):
        data, edits = bytearray(case[0]), case[1]
        for place, count, new in edits:
            at = place % len(data)
            data[at : at + count] = new
        return bytes(data)

    edit = strategies.tuples(
        strategies.integers(0, 700) | strategies.integers(0, 2**15),
        strategies.integers(0, 8),
        strategies.binary(max_size=8),
    )
    whole = strategies.sampled_from([JPEG, PROGRESSIVE, PNG])
    return strategies.tuples(whole, strategies.lists(edit, max_size=4)).map(change)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cuts_and_changes() | strategies.binary(max_size=60).map(lambda data: b"\xff\xd8" + data))
@example(b"\xff\xd8\xff\xfe\0\0" + bytes(20))
def test_random_edits_header_and_decoder_agree(data):
    size = image_size(data)
    try:
        image = decoded(data)
    except ValueError as error:
        assert len(str(error)) < 100
    else:
        assert size == (112, 112) and image.shape == (112, 112, 3) and image.dtype == np.uint8
    array = np.frombuffer(data, np.uint8)
    whole = whole_image(array) if size is not None and size[0] * size[1] < 10**6 else None
    if whole is not None:
        try:
            found = cv2.imdecode(whole, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error:
            return
        assert found is None or found.shape[1::-1] == size
