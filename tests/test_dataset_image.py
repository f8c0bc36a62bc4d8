"""Encoded faces: header and pixels, and what must not reach the decoder."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies

import dataset
from dataset import decode_bgr, image_header

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


def segment(marker, data):
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def png_header(width, height):
    return SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def with_size(jpeg, width, height):
    """The JPEG with another size in its header."""
    at = next(i for i in range(len(jpeg)) if jpeg[i] == 0xFF and jpeg[i + 1] in (0xC0, 0xC2))
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


JPEG, PNG = encoded(".jpg", picture()), encoded(".png", picture())
END = b"\xff\xd9"
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
        assert image_header(data) == image_header(np.frombuffer(data, np.uint8)) == ((width, height), len(data), False)
        if (height, width) == (112, 112):
            assert np.array_equal(decoded(data), cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))
        else:
            with pytest.raises(ValueError, match=f"^image is {width} x {height}, not 112 x 112: align the faces"):
                decoded(data)


def test_segments_before_the_size_are_skipped():
    comment, fill = b"\xff\xfe\x00\x0bcomment\xff\xc0", b"\xff" * 5  # a comment that looks like a header
    data = JPEG[:2] + comment[:4] + b"\xff\xc0\0\x11\x08\0\1\0\1" + fill + JPEG[2:]
    assert image_header(data).size == (112, 112) and np.array_equal(decoded(data), decoded(JPEG))


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
    assert image_header(empty + behind).end == len(empty)
    with pytest.raises(ValueError, match="do not decode"):
        decoded(empty + behind)


def test_other_formats_and_bytes_are_refused_before_they_are_decoded(no_decoder):
    others = [encoded(kind, picture()) for kind in (".ppm", ".jp2")]
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


@pytest.mark.parametrize(
    "name, data",
    [
        ("BMP", encoded(".bmp", picture())),
        ("TIFF", encoded(".tiff", picture())),
        ("TIFF", b"MM\0*\0\0\0\x08"),
        ("WebP", encoded(".webp", picture())),
        ("GIF", b"GIF89ap\0p\0"),
    ],
)
def test_other_formats_are_named(name, data, no_decoder):
    with pytest.raises(ValueError, match=f"^a {name} image; only JPEG and PNG are read: convert it to PNG"):
        decoded(data)


def test_too_many_bytes_are_refused_before_they_are_decoded(no_decoder):
    scan = PROGRESSIVE[PROGRESSIVE.rfind(b"\xff\xda") : -2]  # each such scan is a pass over the whole image
    with pytest.raises(ValueError, match="do not decode"):
        decoded(PROGRESSIVE[:-2] + scan * 1000 + END)
    with pytest.raises(ValueError, match="bytes are too many for 112 x 112 pixels"):
        decoded(JPEG[:2] + segment(0xFE, bytes(60_000)) * 18 + JPEG[2:])


# --- where a JPEG ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jpeg", [JPEG, PROGRESSIVE], ids=["baseline", "progressive"])
def test_a_cut_jpeg_is_refused_whatever_end_markers_it_holds(jpeg, no_decoder):
    """An EXIF thumbnail has one, or a comment. OpenCV before 4.11 would fill the rest with what it decoded before."""
    thumbnail = segment(0xE1, b"Exif\0\0" + encoded(".jpg", picture(20, 20)))
    scan = jpeg.index(b"\xff\xda") + 14
    for cut in (*range(scan, len(jpeg) - 1, 131), len(jpeg) - 1):
        for data in (jpeg[:2] + thumbnail + jpeg[2:cut], jpeg[:cut] + segment(0xFE, END)):
            with pytest.raises(ValueError, match="do not decode"):
                decoded(data)


def test_the_end_of_another_image_is_not_that_of_a_cut_one(no_decoder):
    for cut in range(JPEG.index(b"\xff\xda") + 14, len(JPEG), 131):
        with pytest.raises(ValueError, match="do not decode"):
            decoded(JPEG[:cut] + JPEG)


@pytest.mark.parametrize("image", [JPEG, PROGRESSIVE, PNG], ids=["baseline", "progressive", "png"])
@pytest.mark.parametrize(
    "tail", [bytes(1), bytes(5000), b"text", b"\xff" * 9, b"\xff\xd8", JPEG[:99], PNG, bytes(2 << 20)]
)
def test_what_follows_the_end_is_ignored(image, tail):
    assert np.array_equal(decoded(image + tail), decoded(image))
    assert image_header(image + tail).end == len(image)


def test_what_is_remembered_of_the_last_image_changes_no_answer(monkeypatch):
    other = encoded(".jpg", picture(), cv2.IMWRITE_JPEG_QUALITY, 30)
    turned = JPEG[:2] + segment(0xE1, b"Exif\0\0" + bytes(20)) + JPEG[20:]  # for the segment of JFIF
    images = [
        JPEG,
        PROGRESSIVE,
        other,
        turned,
        with_size(JPEG, 7, 9),
        JPEG[:-9],
        JPEG[:400],
        JPEG[:700] + END + bytes(9),
    ]
    images += [JPEG[:20] + segment(0xFE, b"x" * 5000) + JPEG[20:], PNG, b""]

    def forget():
        monkeypatch.setattr(dataset, "_walked", [(b"\0", None)])

    for first in images:
        for second in images:
            forget()
            expected = image_header(second)
            forget()
            image_header(first)
            assert image_header(second) == expected == image_header(second)
    forget()
    image_header(JPEG)
    assert JPEG.startswith(dataset._walked[0][0]) and len(dataset._walked[0][0]) > 500


# --- EXIF orientation -------------------------------------------------------------------------------------------------

TURNED = {  # TIFF 6.0, tag 274: what the decoded pixels must be turned by
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: np.rot90(image),
}
START, JFIF, REST = JPEG[:2], JPEG[2:20], JPEG[20:]
XMP = b"http://ns.adobe.com/xap/1.0/\0<x/>"
PLACES = {  # where the EXIF segment lies: whether MXNet obeys it, and what comes before and after
    "first": (True, START, REST),
    "before JFIF": (True, START, JFIF + REST),
    "behind a comment": (True, START + segment(0xFE, b"text"), REST),
    "behind a colour profile": (True, START + segment(0xE2, b"ICC_PROFILE\0"), REST),
    "behind JFIF": (False, START + JFIF, REST),
    "behind JFIF and a comment": (False, START + JFIF + segment(0xFE, b"text"), REST),
    "behind XMP": (False, START + segment(0xE1, XMP), REST),
    "behind a fill byte": (False, START + b"\xff", REST),
}


def with_orientation(place, orientation, order):
    """A JPEG with an EXIF segment in one of PLACES; order: of bytes, "<" or ">"."""
    _, before, after = PLACES[place]
    tiff = struct.pack(order + "2sHIHHHIHHI", b"II" if order == "<" else b"MM", 42, 8, 1, 274, 3, 1, orientation, 0, 0)
    return before + segment(0xE1, b"Exif\0\0" + tiff) + after


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("order", "<>")
def test_exif_turns_as_in_mxnet(place, order):
    """What MXNet 1.9.1 was seen to do; test_recordio_mxnet.py asks it."""
    for orientation, turn in TURNED.items():
        image = decoded(with_orientation(place, orientation, order))
        assert np.array_equal(image, (turn if PLACES[place][0] else TURNED[1])(decoded(JPEG)))


def png_with_orientation(orientation):
    tiff = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 274, 3, 1, orientation, 0, 0)
    return PNG[:33] + chunk(b"eXIf", tiff) + PNG[33:]


def test_exif_does_not_turn_a_png():
    assert all(np.array_equal(decoded(png_with_orientation(orientation)), picture()) for orientation in TURNED)


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
    size, end, _ = image_header(data)
    try:
        image = decoded(data)
    except ValueError as error:
        assert len(str(error)) < 100
    else:
        assert size == (112, 112) and image.shape == (112, 112, 3) and image.dtype == np.uint8
    if size is not None and size[0] * size[1] < 10**6 and end is not None:
        try:
            found = cv2.imdecode(np.frombuffer(data[:end], np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error:
            return
        assert found is None or found.shape[1::-1] == size
