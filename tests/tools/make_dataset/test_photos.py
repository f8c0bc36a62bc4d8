"""One photograph to one face: formats, orientations, what is kept, aligned, resized and refused."""

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset import decode_bgr
from tests.conftest import draw_image
from tools.ijbc_eval.align import REFERENCE
from tools.make_dataset.photos import BadPhoto, decode, encoded_face

ORIENTATION = 0x0112
# EXIF's eight values -> how the stored pixels of an upright image look (TIFF 6.0, tag 274), on [H, W, 3].
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def upright(height=130, width=160, seed=0):
    """RGB, smooth: JPEG keeps it nearly as it is."""
    return cv2.resize(draw_image(np.random.default_rng(seed)), (width, height), interpolation=cv2.INTER_CUBIC)


def saved(image, kind, orientation=None, **options):
    file = io.BytesIO()
    if orientation:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    Image.fromarray(np.ascontiguousarray(image)).save(file, kind, **options)
    return file.getvalue()


def trained_on(data):
    """RGB, as training decodes the bytes of a record."""
    return decode_bgr(np.frombuffer(data, np.uint8))[:, :, ::-1]


def apart(one, other):
    return np.abs(one.astype(int) - other).mean()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_of_every_format_comes_out_upright(kind, orientation):
    image = upright()
    options = {"JPEG": {"quality": 97}, "WEBP": {"lossless": True}}.get(kind, {})
    shown = decode(saved(STORED[orientation](image), kind, orientation, **options))
    assert shown.shape == image.shape and apart(shown, image) < (1.5 if kind == "JPEG" else 0.01)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_face_of_112_is_kept_and_the_right_way_up_in_training(kind, orientation):
    image = upright(112, 112)
    data = saved(STORED[orientation](image), kind, orientation, **({"quality": 97} if kind == "JPEG" else {}))
    kept, suffix, _ = encoded_face(data)
    assert apart(trained_on(kept), image) < 1.5
    assert (kept == data) == (orientation == 1) and suffix == (".jpg" if kept[:2] == b"\xff\xd8" else ".png")
    if orientation != 1:
        np.testing.assert_array_equal(trained_on(kept), decode(data))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "PPM", "TGA", "JPEG2000"])
def test_other_formats_of_112_are_kept_pixel_by_pixel(kind):
    data = saved(upright(112, 112), kind)
    kept, suffix, _ = encoded_face(data)
    assert suffix == ".png"
    np.testing.assert_array_equal(trained_on(kept), decode(data))


def test_a_format_of_opencv_alone():
    image = upright()
    with pytest.raises(Exception, match="identify"):
        Image.open(io.BytesIO(cv2.imencode(".hdr", image.astype(np.float32) / 255)[1].tobytes()))
    assert decode(cv2.imencode(".hdr", image.astype(np.float32) / 255)[1].tobytes()).shape == image.shape


def test_grey_deep_transparent_palette_and_printers_colours():
    image, grey = upright(), np.ascontiguousarray(upright()[:, :, 0])
    np.testing.assert_array_equal(decode(saved(grey, "PNG")), np.repeat(grey[:, :, None], 3, 2))
    deep = cv2.imencode(".png", grey.astype(np.uint16) * 257)[1].tobytes()
    np.testing.assert_array_equal(decode(deep), np.repeat(grey[:, :, None], 3, 2))
    clear = np.dstack([image, np.zeros(image.shape[:2], np.uint8)])
    np.testing.assert_array_equal(decode(saved(clear, "PNG")), image)
    file = io.BytesIO()
    Image.fromarray(image).convert("CMYK").save(file, "JPEG", quality=97)
    assert apart(decode(file.getvalue()), image) < 3
    file = io.BytesIO()
    Image.fromarray(image).quantize(256).save(file, "PNG")
    assert apart(decode(file.getvalue()), image) < 8


@settings(deadline=None, max_examples=25)
@given(
    scale=st.floats(0.7, 3.0),
    turn=st.floats(-1.0, 1.0),
    shift=st.tuples(st.floats(5, 60), st.floats(5, 60)),
    orientation=st.sampled_from(list(STORED)),
)
def test_landmarks_bring_a_face_back_from_anywhere(scale, turn, shift, orientation):
    """A face pasted into a photo under any similarity, the photo turned any way, comes out as it went in."""
    face = upright(112, 112, seed=3)
    cos, sin = scale * np.cos(turn), scale * np.sin(turn)
    corners = np.array([[0, 0], [112, 0], [0, 112], [112, 112]]) @ np.array([[cos, sin], [-sin, cos]])
    matrix = np.column_stack([[[cos, -sin], [sin, cos]], shift - corners.min(axis=0)])
    size = np.ceil(np.ptp(corners, axis=0) + np.array(shift) + 20).astype(int)
    photo = cv2.warpAffine(face, matrix, tuple(map(int, size)), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    points = REFERENCE @ matrix[:, :2].T + matrix[:, 2]
    data, suffix, misfit = encoded_face(saved(STORED[orientation](photo), "PNG", orientation), points)
    assert suffix == ".jpg" and misfit < 1e-3
    assert apart(trained_on(data)[4:-4, 4:-4], face[4:-4, 4:-4]) < 4


def test_resize_scales_the_whole_image():
    for height, width in ((448, 224), (50, 60)):
        image = upright(height, width)
        data, suffix, misfit = encoded_face(saved(image, "PNG"), resize=True)
        assert (suffix, misfit) == (".jpg", 0.0)
        assert apart(trained_on(data), cv2.resize(image, (112, 112), interpolation=cv2.INTER_AREA)) < 3


def with_chunk_cut(data):
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize(
    "data, landmarks, reason",
    [
        (b"", None, "empty file"),
        (b"hello, this is a text", None, "not an image"),
        (saved(upright(), "JPEG")[:900], None, "truncated"),
        (with_chunk_cut(saved(upright(112, 112), "JPEG")), None, "truncated"),
        (with_chunk_cut(saved(upright(), "PNG")), None, "truncated|broken|PNG"),
        (saved(upright(), "JPEG"), None, "160 x 130 pixels, not 112 x 112"),
        (saved(upright(), "JPEG"), REFERENCE + 500, "landmarks are outside the picture, 160 x 130"),
        (saved(np.zeros((200, 200, 3), np.uint8), "PNG"), REFERENCE, "black when aligned"),
        (saved(np.zeros((9, 9), np.float32), "TIFF"), None, "floats of unknown range"),
    ],
)
def test_what_cannot_be_trained_on_says_why(data, landmarks, reason):
    with pytest.raises(BadPhoto, match=reason):
        encoded_face(data, landmarks)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded():
    rows = io.BytesIO()
    Image.new("1", (20000, 20000)).save(rows, "PNG")
    with pytest.raises(BadPhoto, match="exceeds limit"):
        encoded_face(rows.getvalue(), resize=True)
