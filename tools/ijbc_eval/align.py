"""Five-point alignment to 112×112: least-squares similarities of all images at once, then one warp per image."""

import cv2
import numpy as np

# Target positions of eyes, nose and mouth corners, as ArcFace-family models were trained (pixels).
REFERENCE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.729904, 92.2041]]
)
SIZE = 112
MISFIT = 10.0  # pixels, see `misfit`: points of a face 1 to 4, of a full profile or in a wrong order 12 to 23


def similarity_matrices(landmarks, reference=REFERENCE):
    """Similarity transforms [N, 2, 3] (float64) from `landmarks` [N, 5, 2] (pixels) to `reference` [5, 2].

    Umeyama's least-squares solution (PAMI 1991, eq. 40-42). In the plane it needs no SVD: with points as complex
    numbers a similarity without reflection is z → a·z + b, and least squares gives a = Σ conj(z − z̄)(w − w̄) /
    Σ |z − z̄|², the same best proper rotation as Umeyama's sign correction. Rows whose five points coincide give NaN.
    """
    factor, shift, _ = _fit(landmarks, reference)
    return np.stack(
        [
            np.stack([factor.real, -factor.imag, shift.real], axis=1),
            np.stack([factor.imag, factor.real, shift.imag], axis=1),
        ],
        axis=1,
    )


def misfit(landmarks, reference=REFERENCE):
    """How far landmarks [N, 5, 2] lie from `reference` after alignment, pixels of the aligned image: float64 [N].

    The root mean square over the five points; infinite for a face that alignment would turn by more than 60 degrees.
    Such points fit well, but are in reverse order, or of the picture before EXIF turned it.
    """
    factor, _, residual = _fit(landmarks, reference)
    return np.where(factor.real < np.abs(factor) / 2, np.inf, residual)


def outside(landmarks, size):
    """Whether landmarks [5, 2] cannot belong to a picture of `size` (width, height), pixels.

    Single points may lie outside, as a detector guesses them for a face that the picture cuts off.
    """
    size = np.asarray(size)
    beyond = np.maximum(-landmarks, landmarks - size).max(axis=1)
    return bool(beyond.min() > 0 or beyond.max() > size.max())


def _fit(landmarks, reference):
    """The a and b above, complex [N], and the root mean square of |a·z + b − w|, float64 [N]."""
    landmarks = np.asarray(landmarks, np.float64)
    source = landmarks[..., 0] + 1j * landmarks[..., 1]  # [N, 5]
    target = reference[:, 0] + 1j * reference[:, 1]  # [5]
    centre = source.mean(axis=1, keepdims=True)
    spread = source - centre
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = (spread.conj() * (target - target.mean())).sum(axis=1) / (np.abs(spread) ** 2).sum(axis=1)
    left = np.abs(factor[:, None] * spread - (target - target.mean()))
    return factor, target.mean() - factor * centre[:, 0], np.sqrt((left**2).mean(axis=1))


def align(image, matrix):
    """Warp an image [H, W, 3] by `matrix` [2, 3] to [112, 112, 3]: bilinear, zero outside."""
    return cv2.warpAffine(image, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderValue=0)
