"""AdvBCT's elastic boundary: a new feature must lie within its old class, or a learned distance beyond it.

Tan Pan et al., "Boundary-aware Backward-Compatible Representation via Adversarial Learning in Image Retrieval",
CVPR 2023, arXiv:2305.02610.

Per class, over its L2-normalised old features: centre c = their mean, not normalised again; r_max = the largest
distance to it, outliers excluded. With a learnable scalar e per class and a threshold t,

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

from core.agreement import check_ranks_agree, check_shared
from core.distributed import barrier, gather_objects, is_main, sum_over_ranks
from core.files import atomic_write
from core.manifest import ManifestError, digest, read_manifest, write_manifest
from engine.monitor import log
from old_model.by_class import check_labels, squared_distances_to_means, unit_class_means
from old_model.feature_set import FeatureError

WHISKER = 1.5  # outliers lie this many interquartile ranges outside the quartiles
ENOUGH = 4  # distances that a class needs before its outliers are dropped


def class_boundaries(features, labels, num_classes):
    """Centre and radius of each class of the old features.

    features: float [N, D], memory-mapped or not, any scale; labels: int [N], any order, 0 ... num_classes - 1.
    With n >= 4 features in a class, sorted distances d to the centre outside [q1 - 1.5 (q3 - q1), q3 + 1.5 (q3 - q1)]
    are dropped, where q1 = d[n // 4] and q3 = d[3 n // 4].

    Returns `(centers, radius, count)`: float32 [C, D]; float32 [C], the largest distance kept; int64 [C], how many
    are kept. Zeros for a class without images. Two passes over the rows in chunks, sums in float64.
    Raises FeatureError for labels out of range or rows that are not finite.
    """
    labels = np.asarray(labels)
    check_labels(features, labels, num_classes)
    centers = unit_class_means(features, labels, num_classes)
    distance = np.sqrt(squared_distances_to_means(features, labels, centers))
    radius, count = _radii(distance, labels, np.bincount(labels, minlength=num_classes))
    return centers.astype(np.float32), radius.astype(np.float32), count


def _radii(distance, labels, size):
    """`(radius [C], count [C])`: each class's largest distance without outliers, and the number of those distances."""
    order = np.lexsort((distance, labels))
    ordered = np.append(distance[order], 0.0)  # padding: an empty last class indexes one past the end
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
    """`(centers [C, D], radius [C], count [C])` tensors on the CPU, read from `path`; collective: call it on all ranks.

    old: OldFeatures. Rank 0 writes the file first unless its manifest says that it is made from these features.
    Raises FeatureError for a damaged file or one of another shape; DisagreementError if not all ranks see the disk that
    rank 0 would write to, before it computes, or if the ranks' files differ.
    """
    path = pathlib.Path(path)
    if reason := gather_objects(_why_redo(path, old) if is_main() else None)[0]:
        check_shared(path.parent, "set center_radius to a file on a disk that all machines share")
        if is_main():
            log.info("computing the boundaries: %s", reason)
            _save(path, digest(old.path), *class_boundaries(old.features, old.labels[:], num_classes))
        barrier()
    check_ranks_agree(center_radius=digest(path) if path.is_file() else None)
    try:
        with np.load(path) as file:
            arrays = [torch.from_numpy(file[name]) for name in ("centers", "radius", "count")]
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise FeatureError(
            f"{path}: not a readable file of centres and radii ({error}); delete it to have it rebuilt"
        ) from error
    shapes = [(num_classes, old.features.shape[1]), (num_classes,), (num_classes,)]
    if [tuple(array.shape) for array in arrays] != shapes:
        raise FeatureError(
            f"{path}: centres {list(arrays[0].shape)}, but {old.path} has {num_classes} classes of width "
            f"{old.features.shape[1]}; delete it to have it rebuilt, or set center_radius to another file"
        )
    return arrays


def _why_redo(path, old):
    if not path.is_file():
        return f"{path}: no such file yet"
    try:
        made_from = read_manifest(path, "").get("features")
    except ManifestError as error:
        return str(error).partition(";")[0]
    if made_from and made_from != digest(old.path):
        return f"{path}: made from other features than {old.path}"


def _save(path, features, centers, radius, count):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, centers=centers, radius=radius, count=count)
            write_manifest(path, file, "class boundaries", features=features)
    except OSError as error:
        raise FeatureError(
            f"{path}: cannot be written ({error.strerror}); set center_radius to a writable path"
        ) from error


class ElasticBoundary(nn.Module):
    """A learnable scalar per class, `elastic` [num_classes], initially uniform in (-1, 1), that moves r_y towards t."""

    def __init__(self, num_classes):
        super().__init__()
        self.elastic = nn.Parameter(torch.empty(num_classes).uniform_(-1, 1))

    def forward(self, labels, radius, threshold):
        """r_y [B] of labels [B]: radius + sigmoid(e) (threshold - radius), with radius [C]."""
        radius = radius[labels]
        return radius + torch.sigmoid(self.elastic[labels]) * (threshold - radius)


def point_to_set_loss(embeddings, labels, centers, radius, count, boundary, threshold):
    """Mean distance by which new features lie outside their class boundary, over those outside; 0 if none is.

    embeddings: [B, D], this rank's new features, any scale; labels: int64 [B]. centers [C, D], radius [C] and count [C]
    of `class_boundaries`, on the same device; a class with count <= 1 has no boundary. boundary: ElasticBoundary;
    threshold: the distance t that r_max is moved towards.
    Returns a scalar: the mean over the images outside in the *global* batch, the same on all ranks. Gradients go to
    the embeddings and to the boundary.
    """
    new = F.normalize(embeddings.to(centers.dtype))
    excess = torch.linalg.vector_norm(new - centers[labels], dim=1) - boundary(labels, radius, threshold)
    outside = (excess > 0) & (count[labels] > 1)
    total, number = sum_over_ranks(torch.stack([torch.where(outside, excess, 0).sum(), outside.sum().to(excess.dtype)]))
    return total / number.detach().clamp(min=1)
