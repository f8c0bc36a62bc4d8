"""A photograph, in any format that Pillow or OpenCV reads -> the encoded face of 112×112 pixels that is trained on."""

import contextlib
import io
import warnings

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dataset import IMAGE_SHAPE, decode_bgr
from tools.ijbc_eval.align import SIZE, align, misfit, outside, similarity_matrices

_QUALITY = 95  # of JPEG, im2rec's default
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow's modes of 16-bit grey


class BadPhoto(Exception):
    """Why an image cannot be trained on."""


def encoded_face(data, landmarks=None, resize=False):
    """`(bytes, ".jpg" or ".png", misfit)` of the face in the encoded image `data`.

    112×112 is kept: byte for byte a JPEG or PNG that needs no turning, else its pixels as PNG. Other sizes are aligned
    by `landmarks`, float64 [5, 2], pixels of the image as it is displayed, or else, if `resize`, scaled as a whole,
    whatever the shape; both are stored as JPEG. misfit: as align.misfit, 0.0 where nothing was aligned.
    Raises BadPhoto for an image that cannot be read or is of another size without landmarks and `resize`, and for
    landmarks that cannot be its own.
    """
    if kept := _training_image(data):
        return *kept, 0.0
    image = decode(data)
    if image.shape == IMAGE_SHAPE:
        return _encoded(image, ".png"), ".png", 0.0
    height, width = image.shape[:2]
    if landmarks is not None:
        if outside(landmarks, (width, height)):
            raise BadPhoto(f"its landmarks are outside the picture, {width} x {height} pixels as displayed")
        face = align(image, similarity_matrices(landmarks[None])[0])
        if not face.any():
            raise BadPhoto("black when aligned")
        return _encoded(face, ".jpg"), ".jpg", float(misfit(landmarks[None])[0])
    if not resize:
        raise BadPhoto(f"{width} x {height} pixels, not 112 x 112")
    shrinks = min(height, width) >= SIZE
    face = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return _encoded(face, ".jpg"), ".jpg", 0.0


def decode(data):
    """The image as it is displayed, RGB uint8 [H, W, 3]: the first frame, EXIF orientation applied, alpha dropped.

    Raises BadPhoto.
    """
    with _reasons():
        try:
            photo = Image.open(io.BytesIO(data))
        except UnidentifiedImageError:
            return _decoded_by_opencv(data)
        with photo:
            if photo.format == "JPEG" and photo.mode == "RGB" and not _is_turned(photo):
                image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
                if image is not None:  # two to four times as fast as Pillow, which can say what is wrong
                    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            photo.load()
            turned = ImageOps.exif_transpose(photo)  # after load: Pillow itself turns a TIFF there
            if turned.mode in _DEEP:
                grey = np.clip(np.asarray(turned, np.int64) >> 8, 0, 255).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            if turned.mode == "F":
                raise BadPhoto("pixels are floats of unknown range")
            return np.asarray(turned.convert("RGB"))


def _training_image(data):
    """`(data, suffix)` if dataset.py reads it as it is, the right way up; else None."""
    with contextlib.suppress(BadPhoto, ValueError), _reasons(), Image.open(io.BytesIO(data)) as photo:
        suffix = {"JPEG": ".jpg", "PNG": ".png"}.get(photo.format)
        if suffix and photo.size == (SIZE, SIZE) and not _is_turned(photo):
            decode_bgr(np.frombuffer(data, np.uint8))
            return data, suffix
    return None


def _is_turned(photo):
    return photo.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)


def _decoded_by_opencv(data):
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if image is None:
        raise BadPhoto("not an image that Pillow or OpenCV can read" if data else "empty file")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


@contextlib.contextmanager
def _reasons():
    """Turn what the decoders raise, which has no common base class, into BadPhoto; their warnings are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (BadPhoto, MemoryError):
            raise
        except Exception as error:
            raise BadPhoto(" ".join(f"{error or type(error).__name__}".split())[:200]) from None


def _encoded(image, suffix):
    how = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY] if suffix == ".jpg" else []
    return cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), how)[1].tobytes()
