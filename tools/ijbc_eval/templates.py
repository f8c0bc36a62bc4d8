"""From image embeddings to template features: one sparse matrix product."""

import dataclasses
import itertools

import numpy as np
import torch
from scipy import sparse

from losses import to_old_width
from tools.ijbc_eval.files import EvalError

LARGEST = 1e30  # embeddings and features must be below, so that their lengths are far from float32's limit


@dataclasses.dataclass(frozen=True)
class Setting:
    """How image embeddings enter a template: N: normalised to length 1, D: times the detection score, F: plus the
    mirrored image's embedding. The default, N0D1F1, is that of published numbers."""

    normalise: bool = False
    detector_score: bool = True
    flip: bool = True

    @property
    def name(self):
        return f"N{self.normalise:d}D{self.detector_score:d}F{self.flip:d}"

    @classmethod
    def all(cls):
        return [cls(*switches) for switches in itertools.product([False, True], repeat=3)]


def template_features(embs, embs_f, faces, setting=Setting(), bad=None):
    """L2-normalised template features, float32 [templates, D], in the order of `faces.template_ids`.

    embs, embs_f: float32 [images, D], embeddings of the images and of the mirrored images.
    faces: protocol.Faces. bad: bool [images] or None; such images are ignored. EvalError if a feature is not
    finite.

    A template is the sum over its media of the mean over a medium's images (IJB-A, Klare et al., CVPR 2015: a long
    video must not outweigh a portrait), so each image has the weight score / (images of its medium): T = W·E with W
    sparse [templates, images], and one more product for the mirrored images.
    """
    image, template, medium = faces.image, faces.template, faces.medium
    if bad is not None and bad.any():
        keep = ~bad[image]
        image, template, medium = image[keep], template[keep], medium[keep]
    weight = 1.0 / np.bincount(medium)[medium]
    if setting.detector_score:
        weight = weight * faces.scores[image]
    if setting.normalise:
        weight = weight / _lengths(embs, embs_f if setting.flip else None, bad)[image]
    pool = sparse.csr_matrix(
        (weight.astype(np.float32), (template, image)), shape=(len(faces.template_ids), len(embs)), dtype=np.float32
    )
    features = pool @ embs
    if setting.flip:
        features += pool @ embs_f
    sound = np.abs(features).max(axis=1) < LARGEST
    if not sound.all():
        raise EvalError(
            f"template {faces.template_ids[np.argmin(sound)]}: embeddings times detection scores are not finite, or "
            f"above {LARGEST:g}; correct the scores, or use another checkpoint"
        )
    return l2_normalise(features)


def as_query(features, width):
    """Template features float32 [T, D], L2-normalised -> the part that searches a gallery of `width`: [T, width]."""
    if features.shape[1] == width:
        return features  # normalising them again would change digits
    return to_old_width(torch.from_numpy(features), width).numpy()


def l2_normalise(features):
    """Rows divided by their length; a row of zeros stays zero. float32 [N, D], below LARGEST -> float32 [N, D]."""
    with np.errstate(over="ignore"):
        length = np.sqrt(np.einsum("nd,nd->n", features, features))
    length = _where_squares_fail(features, length)
    return features / np.where(length > 0, length, 1)[:, None]


def _where_squares_fail(rows, length):
    """`length` of rows, computed again in float64 where squares may have over- or underflowed in float32."""
    odd = np.flatnonzero(~((length > 1e-15) & (length < 1e15)))
    length[odd] = np.linalg.norm(rows[odd].astype(np.float64), axis=1)
    return length


def _lengths(embs, embs_f, bad, chunk=16384):
    """Lengths of the embeddings (plus the mirrored ones), in chunks to save memory."""
    lengths = np.empty(len(embs), np.float32)
    for start in range(0, len(embs), chunk):
        rows = embs[start : start + chunk]
        if embs_f is not None:
            rows = rows + embs_f[start : start + chunk]
        with np.errstate(over="ignore"):
            lengths[start : start + chunk] = _where_squares_fail(rows, np.linalg.norm(rows, axis=1))
    lengths[lengths == 0] = 1  # a zero embedding has no direction; it stays zero
    if bad is not None:
        lengths[bad] = 1
    return lengths
