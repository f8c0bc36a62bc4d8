"""AdvBCT's elastic boundary: a new feature must lie within its old class, or a learned distance beyond it.

Tan Pan et al., "Boundary-aware Backward-Compatible Representation via Adversarial Learning in Image Retrieval",
CVPR 2023, arXiv:2305.02610.

Per class, over its L2-normalised old features: centre c = their mean, not normalised again; r_max = the largest
distance to it, outliers excluded. With a learnable scalar e per class and a threshold t,

    r_y = r_max + sigmoid(e_y) (t - r_max)
    point-to-set loss = mean over the images outside, ||f - c_y|| > r_y, of ||f - c_y|| - r_y
"""

import os
import pathlib
import re
import zipfile

import numpy as np
import torch
from torch import nn

from core.agreement import check_ranks_agree, check_shared
from core.distributed import (
    barrier,
    gather_arrays,
    gather_objects,
    is_main,
    rank,
    rows_of_rank,
    sum_over_ranks,
    world_size,
)
from core.files import atomic_write
from core.manifest import ManifestError, digest, read_manifest, write_manifest
from engine.monitor import log
from losses.old_width import to_old_width
from losses.sharded import ShardedRows
from old_model.by_class import ClassMeans
from old_model.feature_set import FeatureError

WHISKER = 1.5  # outliers lie this many interquartile ranges outside the quartiles
ENOUGH = 4  # distances that a class needs before its outliers are dropped


def class_boundaries(features, labels, num_classes):
    """Centre and radius of each class of the old features.

    features: float [N, D], memory-mapped or not, any scale; labels: int [N], any order, 0 ... num_classes - 1.
    With n >= 4 features in a class, sorted distances d to the centre outside [q1 - 1.5 (q3 - q1), q3 + 1.5 (q3 - q1)]
    are dropped, where q1 = d[n // 4] and q3 = d[3 n // 4].

    Returns `(centers, radius, count)`: float32 [C, D]; float32 [C], the largest distance kept; int64 [C], how many
    are kept. A row of zeros is no feature; zeros for a class without features. Two passes over the rows in chunks, sums
    in float64.
    Raises FeatureError for labels out of range or rows that are not finite.
    """
    if len(labels) != len(features):
        raise FeatureError(f"{len(features)} features, but {len(labels)} labels; run get_feature again")
    centers = []
    radius, count = boundaries_by_ranks(features, labels, num_classes, centers.append)
    return np.concatenate(centers), radius, count


def boundaries_by_ranks(features, labels, num_classes, put):
    """As `class_boundaries`, by all ranks: `(radius, count)` on rank 0, None on the others, each reading its share.

    put: takes the centres, float32 [b, D], a bucket after the other, the same on all ranks.
    """
    classes = ClassMeans(features, labels, num_classes)
    for part, totals in classes.totals():
        put((totals / np.maximum(classes.counts[part], 1)[:, None]).astype(np.float32))
    distance = gather_arrays(np.sqrt(classes.squared_distances()))
    if distance is None:
        return None
    there = ~np.isnan(distance)
    radius, count = _radii(distance[there], np.asarray(labels[:])[there], classes.counts)
    return radius.astype(np.float32), count


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
    """`(centers, radius [C], count [C])`, on the CPU, read from `path`; collective: call it on all ranks.

    old: OldFeatures. The ranks write the file first unless its manifest says that it is made from these features.
    centers: a ShardedRows of [C, D]. Raises FeatureError for a damaged file or one of another shape; DisagreementError
    if not all ranks see the disk that the file is written to, before they compute, or if the ranks' files differ.
    """
    path = pathlib.Path(path)
    if reason := gather_objects(_why_redo(path, old) if is_main() else None)[0]:
        check_shared(path.parent, "set center_radius to a file on a disk that all machines share")
        log.info("computing the boundaries: %s", reason)
        _write(path, old, num_classes)
        barrier()
    check_ranks_agree(center_radius=digest(path) if path.is_file() else None)
    start, stop = rows_of_rank(num_classes, rank(), world_size())
    try:
        shape, centers = _read_rows(path, start, stop)
        with np.load(path) as file:
            radius, count = (torch.from_numpy(file[name]) for name in ("radius", "count"))
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise FeatureError(
            f"{path}: not a readable file of centres and radii ({error}); delete it to have it rebuilt"
        ) from error
    if (shape, radius.shape, count.shape) != ((num_classes, old.features.shape[1]), (num_classes,), (num_classes,)):
        raise FeatureError(
            f"{path}: centres {list(shape)}, but {old.path} has {num_classes} classes of width "
            f"{old.features.shape[1]}; delete it to have it rebuilt, or set center_radius to another file"
        )
    return ShardedRows(torch.from_numpy(centers), start), radius, count


def _read_rows(path, start, stop):
    """`(shape [C, D], rows start ... stop - 1 float32)` of the centres, without reading the others into memory."""
    with zipfile.ZipFile(path) as archive, archive.open("centers.npy") as member:
        read = getattr(np.lib.format, "read_array_header_{}_{}".format(*np.lib.format.read_magic(member)))
        shape, fortran, dtype = read(member)
        if fortran or dtype != np.float32 or len(shape) != 2:
            raise ValueError(f"centres of {dtype} {list(shape)}")
        size = dtype.itemsize * shape[1]
        member.seek(start * size, os.SEEK_CUR)
        rows = np.frombuffer(bytearray(member.read((stop - start) * size)), np.float32)
        return shape, rows.reshape(-1, shape[1])


def _why_redo(path, old):
    if not path.is_file():
        return f"{path}: no such file yet"
    try:
        made_from = read_manifest(path, "").get("features")
    except ManifestError as error:
        return str(error).partition(";")[0]
    if made_from and made_from != digest(old.path):
        return f"{path}: made from other features than {old.path}"


def _write(path, old, num_classes):
    """Compute the boundaries on all ranks; rank 0 writes them as np.savez does, the centres as they come."""
    shape = num_classes, old.features.shape[1]
    if not is_main():
        boundaries_by_ranks(old.features, old.labels, num_classes, lambda centers: None)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            with zipfile.ZipFile(file, "w") as archive:
                with archive.open("centers.npy", "w", force_zip64=True) as member:
                    header = np.lib.format.header_data_from_array_1_0(np.empty(0, np.float32))
                    np.lib.format.write_array_header_1_0(member, {**header, "shape": shape})
                    radius, count = boundaries_by_ranks(old.features, old.labels, num_classes, member.write)
                for name, array in (("radius", radius), ("count", count)):
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.save(member, array)
            write_manifest(path, file, "class boundaries", features=digest(old.path))
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

    embeddings: [B, D], this rank's new features, any scale, compared by `to_old_width`; labels: int64 [B].
    centers [C, d_old], or a ShardedRows, radius [C] and count [C] of `class_boundaries`, on the same device; a class
    with count <= 1 has no boundary. boundary: ElasticBoundary; threshold: the distance t that r_max is moved towards.
    Returns a scalar: the mean over the images outside in the *global* batch, the same on all ranks. Gradients go to
    the embeddings and to the boundary.
    """
    own = centers[labels]
    new = to_old_width(embeddings.to(own.dtype), own.shape[1])
    excess = torch.linalg.vector_norm(new - own, dim=1) - boundary(labels, radius, threshold)
    outside = (excess > 0) & (count[labels] > 1)
    total, number = sum_over_ranks(torch.stack([torch.where(outside, excess, 0).sum(), outside.sum().to(excess.dtype)]))
    return total / number.detach().clamp(min=1)
