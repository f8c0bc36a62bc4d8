"""The camera: from a portrait to the JPEG of an aligned face or of a loose crop."""

import math

import cv2
import numpy as np

from tools.demo_data import geometry
from tools.demo_data.face import Portrait

SIZE = 112  # pixels across an aligned face
SUPERSAMPLE = 2  # images are drawn larger by this factor and averaged down
MM = 0.56  # pixels per millimetre in an aligned frontal face; the conditions' pixels are of that size


def aligned(traits, conditions):
    """BGR uint8 [112, 112, 3]: the face warped to the standard five points, by landmarks with the detector's error."""
    portrait = Portrait(traits, conditions)
    fit = geometry.similarity(portrait.landmarks, geometry.STANDARD_POINTS)
    found = geometry.apply(fit, portrait.landmarks) + conditions.jitter
    wrong = geometry.similarity(found, geometry.STANDARD_POINTS)
    matrix = wrong @ np.concatenate([fit, [[0, 0, 1]]])
    image = portrait.paint(matrix * SUPERSAMPLE, SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE)
    image = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return expose(image, conditions, 1.0)


def loose(rng, traits, conditions):
    """A crop with some margin around a rotated face -> (BGR uint8 [h, w, 3], landmarks float64 [5, 2] in its pixels).

    The landmarks are the exact ones plus the conditions' jitter, as a detector would report them.
    """
    portrait = Portrait(traits, conditions)
    scale = MM * math.exp(rng.uniform(math.log(0.75), math.log(1.9)))  # pixels a mm
    margin, dx, dy, stretch = rng.uniform(1.0, 1.35), *rng.uniform(-0.08, 0.08, 2), rng.uniform(0.92, 1.12)
    width, height = round(190 * margin * scale), round(235 * margin * scale * stretch)
    cos, sin = scale * math.cos(conditions.roll), scale * math.sin(conditions.roll)
    middle = np.array([[cos, -sin], [sin, cos]]) @ (0.0, 18.0)
    matrix = np.array([[cos, -sin, width * (0.5 + dx) - middle[0]], [sin, cos, height * (0.5 + dy) - middle[1]]])
    image = portrait.paint(matrix * SUPERSAMPLE, width * SUPERSAMPLE, height * SUPERSAMPLE)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    landmarks = geometry.apply(matrix, portrait.landmarks) + conditions.jitter * (scale / MM)
    return expose(image, conditions, scale / MM), landmarks


def expose(image, conditions, scale):
    """Blur, resolution, colour, noise; `scale`: image pixels per pixel of an aligned face."""
    c = conditions
    height, width = image.shape[:2]
    if c.resolution < 0.97:
        share = min(1.0, c.resolution / scale)
        size = max(8, round(width * share)), max(8, round(height * share))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        image = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    if c.blur > 0.35:
        image = cv2.GaussianBlur(image, (0, 0), c.blur * scale)
    length = math.hypot(*c.motion) * scale
    if length > 1:
        image = cv2.filter2D(image, -1, _motion_kernel(np.array(c.motion) * scale))
    levels = np.linspace(0, 1, 256)[:, None] ** c.gamma * np.array(c.tint) * c.exposure
    table = np.clip(levels * 255, 0, 255).astype(np.uint8)
    image = cv2.LUT(image, table.reshape(256, 1, 3))
    noise = np.random.default_rng(c.grain).standard_normal(image.shape, np.float32) * np.float32(c.noise)
    return cv2.add(image, noise, dtype=cv2.CV_8U)


def _motion_kernel(motion):
    size = 2 * math.ceil(np.abs(motion).max() / 2) + 1
    kernel = np.zeros((size, size), np.float32)
    middle = size // 2
    ends = [tuple(int(v) for v in np.rint((middle + sign * motion / 2) * 16)) for sign in (-1, 1)]
    cv2.line(kernel, *ends, 1.0, 1, cv2.LINE_AA, 4)
    return kernel / max(kernel.sum(), 1e-6)


def encode(image, conditions):
    """JPEG bytes at the conditions' quality."""
    ok, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, conditions.jpeg])
    if not ok:
        raise RuntimeError(f"OpenCV could not encode a {image.shape} image as JPEG")
    return data.tobytes()
