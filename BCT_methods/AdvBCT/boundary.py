"""AdvBCT's elastic boundary: a new feature shall lie within its class as the old model drew it, or a little beyond.

Tan Pan et al., "Boundary-aware Backward-Compatible Representation via Adversarial Learning in Image Retrieval",
CVPR 2023, arXiv:2305.02610.

Of a class's L2-normalised old features: centre c = their mean, not normalised again; r_max = the largest distance to
it that is no outlier. With a learnable scalar e a class and a threshold t,

    r_y = r_max + sigmoid(e_y) (t - r_max)
    point-to-set loss = mean over the images outside, ||f - c_y|| > r_y, of ||f - c_y|| - r_y
"""

import pathlib
import re
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from core.distributed import barrier, is_main, sum_over_ranks
from core.files import atomic_write
from old_model.by_class import squared_distances_to_means, unit_class_means
from old_model.feature_set import FeatureError

WHISKER = 1.5  # outliers lie this many interquartile ranges outside the quartiles
ENOUGH = 4  # distances from which on there are quartiles to speak of


def class_boundaries(features, labels, num_classes):
    """Centre and radius of each class of the old features.

    features: float [N, D], memory-mapped or not, any scale; labels: int [N], any order, 0 ... num_classes - 1.
    Of the sorted distances d of a class's n features to their centre, where n >= 4, those outside
    [q1 - 1.5 (q3 - q1), q3 + 1.5 (q3 - q1)] are dropped, with q1 = d[n // 4] and q3 = d[3 n // 4].

    Returns `(centers, radius, count)`: float32 [C, D]; float32 [C], the largest distance left; int64 [C], how many
    are left. A class without images has zeros. Two passes over the rows, a chunk at a time, sums in float64.
    Raises FeatureError for labels out of range or rows that are not finite.
    """
    labels = np.asarray(labels)
    if len(labels) != len(features):
        raise FeatureError(f"{len(features)} features, but {len(labels)} labels; run get_feature again")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise FeatureError(
            f"labels go from {labels.min()} to {labels.max()}, but there are {num_classes} classes; "
            "run get_feature again"
        )
    centers = unit_class_means(features, labels, num_classes)
    distance = np.sqrt(squared_distances_to_means(features, labels, centers))
    radius, count = _radii(distance, labels, np.bincount(labels, minlength=num_classes))
    return centers.astype(np.float32), radius.astype(np.float32), count


def _radii(distance, labels, size):
    """`(radius [C], count [C])`: largest distance of a class that is no outlier, and how many are none."""
    order = np.lexsort((distance, labels))
    ordered = np.append(distance[order], 0.0)  # one more, for what an empty last class would look up
    first = np.cumsum(size) - size
    low, high = ordered[first + size // 4], ordered[first + 3 * size // 4]
    reach = np.where(size >= ENOUGH, WHISKER * (high - low), np.inf)
    inside = (distance >= (low - reach)[labels]) & (distance <= (high + reach)[labels])
    count = np.bincount(labels[inside], minlength=len(size))
    radius = np.zeros(len(size))
    np.maximum.at(radius, labels[inside], distance[inside])
    return radius, count


def default_path(feature_path):
    """`..._feature.npy` -> `..._center_radius.npz` beside it."""
    return re.sub(r"(_feature)?\.npy$", "", str(feature_path)) + "_center_radius.npz"


def load_boundaries(path, old, num_classes):
    """`(centers [C, D], radius [C], count [C])` tensors on the CPU, from the file `path`; all ranks call it together.

    old: OldFeatures. Rank 0 writes the file first where it is missing or older than the features.
    Raises FeatureError for a file that is damaged or of other features.
    """
    path = pathlib.Path(path)
    if is_main() and not (path.is_file() and path.stat().st_mtime_ns >= old.path.stat().st_mtime_ns):
        _save(path, *class_boundaries(old.features, old.labels, num_classes))
    barrier()
    try:
        with np.load(path) as file:
            arrays = [torch.from_numpy(file[name]) for name in ("centers", "radius", "count")]
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise FeatureError(
            f"{path}: not a readable file of centres and radii ({error}); delete it, and it is written again"
        ) from error
    shapes = [(num_classes, old.features.shape[1]), (num_classes,), (num_classes,)]
    if [tuple(array.shape) for array in arrays] != shapes:
        raise FeatureError(
            f"{path}: centres {list(arrays[0].shape)}, but {old.path} has {num_classes} classes of width "
            f"{old.features.shape[1]}; delete it, and it is written again, or set center_radius to another file"
        )
    return arrays


def _save(path, centers, radius, count):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, centers=centers, radius=radius, count=count)
    except OSError as error:
        raise FeatureError(
            f"{path}: could not be written ({error.strerror}); set center_radius to a place that can"
        ) from error


class ElasticBoundary(nn.Module):
    """A learnable scalar a class, `elastic` [num_classes], at first uniform in (-1, 1): how far r_y lies towards t."""

    def __init__(self, num_classes):
        super().__init__()
        self.elastic = nn.Parameter(torch.empty(num_classes).uniform_(-1, 1))

    def forward(self, labels, radius, threshold):
        """r_y of labels [B]: radius [C] + sigmoid(e) (threshold - radius), between the two. Returns [B]."""
        radius = radius[labels]
        return radius + torch.sigmoid(self.elastic[labels]) * (threshold - radius)


def point_to_set_loss(embeddings, labels, centers, radius, count, boundary, threshold):
    """How far new features lie outside their old classes, on average over those outside; 0 if none is.

    embeddings: [B, D], this rank's new features, any scale; labels: int64 [B]. centers [C, D], radius [C] and count [C]
    of `class_boundaries`, on the same device; a class with count <= 1 holds nobody back. boundary: ElasticBoundary;
    threshold: the distance that it stretches, or shrinks, r_max towards.
    Returns a scalar: the mean over the images outside in the *global* batch, the same on all ranks. Gradients go to
    the embeddings and to the boundary.
    """
    new = F.normalize(embeddings.to(centers.dtype))
    excess = torch.linalg.vector_norm(new - centers[labels], dim=1) - boundary(labels, radius, threshold)
    outside = (excess > 0) & (count[labels] > 1)
    total, number = sum_over_ranks(torch.stack([torch.where(outside, excess, 0).sum(), outside.sum().to(excess.dtype)]))
    return total / number.detach().clamp(min=1)
