"""UniBCT's prototypes: class means of old features, weighted by the similarity of the class's new features.

Binjie Zhang, Yixiao Ge, Yantao Shen, Shupeng Su, Chun Yuan, Xuyuan Xu, Yexin Wang, Ying Shan,
"Towards Universal Backward-Compatible Representation Learning", IJCAI 2022, arXiv:2203.01583.

Per class, with new features N [n, D'] (L2-normalised, whole) and old ones V [n, D] (as stored):

    E = softmax over each row of N·Nᵀ/τ, the diagonal at −∞
    V̂ = (1 − λ)(I − λE)⁻¹ V
    prototype = mean of V̂'s rows, L2-normalised only with normalize=True

Only the mean of V̂ is needed. It is wᵀV with wᵀ = (1 − λ)/n · 1ᵀ(I − λE)⁻¹: one solution of the transposed system
(I − λEᵀ) x = 1 instead of D right-hand sides. w is non-negative and sums to 1, since E's rows do: w_i is how often
random walks over the class visit image i, and they rarely visit an outlier.

An image whose row in V is zero has no old feature and is left out of its class; a class of such images has prototype 0.
"""

import numpy as np
import torch
import torch.nn.functional as F

from core.distributed import default_device

CHUNK_VALUES = 1 << 25  # values in memory at once, of old and of new features each: 128 MB in float32
BATCH_VALUES = 1 << 23  # values of a batch of classes, similarities and features together
ALIKE = 0.8  # a batch's smallest class has at least this share of its largest one's images


def refine_prototypes(
    old_features, new_features, labels, damping=0.9, temperature=0.05, normalize=False, *, classes=None, device=None
):
    """Refined prototypes of the classes; the formula is at the top of this file.

    old_features, new_features: float [N, D] and [N, D'], tensors, arrays or RowFiles; rows are read a few classes at a
        time, never copied as a whole. labels: int [N], 0 … C − 1 in any order.
    damping: λ in [0, 1); 0 gives the plain class means. temperature: τ above 0, divides cosines.
    normalize: L2-normalise the prototypes. The published code does not: a class that the old model knows well has a
        longer mean and weighs more.
    classes: `(start, stop)`, the range of classes to compute; default: all.
    device: where to compute; default: the features' GPU, else CUDA if available, else the CPU.

    Returns [stop − start, D] on the device of old_features (CPU for arrays); float32, or float64 if an input is.
    Memory: about 0.5 GB, or several times the n² similarities of the largest class.
    Raises ValueError for mismatched shapes, values out of range, a class without images and non-finite rows.
    """
    if not 0 <= damping < 1:
        raise ValueError(f"damping = {damping} must be in [0, 1)")
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature} must be above 0")
    labels = labels.cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if labels.ndim != 1 or not len(old_features) == len(new_features) == len(labels) > 0:
        raise ValueError(
            f"{len(old_features)} old features, {len(new_features)} new features and {len(labels)} labels: "
            "the counts must be equal and above 0"
        )
    if labels.min() < 0:
        raise ValueError(f"labels must be 0 or more; row {int(labels.argmin())} has {int(labels.min())}")
    start, stop = classes or (0, int(labels.max()) + 1)
    device = torch.device(device or _default_device(old_features))
    dtype = torch.float64 if "float64" in f"{old_features.dtype} {new_features.dtype}" else torch.float32
    width = old_features.shape[1]

    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels, np.arange(start, stop + 1), sorter=order)
    counts = np.diff(bounds)
    if not counts.all():
        empty = np.flatnonzero(counts == 0)
        raise ValueError(f"class {start + empty[0]} has no image ({len(empty)} classes have none)")

    prototypes = torch.empty(stop - start, width, dtype=dtype)
    for first, last in _chunks(bounds, CHUNK_VALUES // max(width, new_features.shape[1])):
        rows = np.sort(order[bounds[first] : bounds[last]])  # ascending, for sequential reads
        by_class = torch.from_numpy(np.argsort(labels[rows], kind="stable")).to(device)
        prototypes[first:last] = _refine_chunk(
            _take(old_features, rows, device, dtype, "old"),
            F.normalize(_take(new_features, rows, device, dtype, "new"), dim=1),
            by_class,
            counts[first:last],
            damping,
            temperature,
        ).cpu()
    if normalize:
        prototypes = F.normalize(prototypes, dim=1)
    return prototypes.to(old_features.device) if isinstance(old_features, torch.Tensor) else prototypes


def _default_device(features):
    if isinstance(features, torch.Tensor) and features.is_cuda:
        return features.device
    return default_device()


def _take(features, rows, device, dtype, name):
    """Rows [R] of an array or a tensor, as a tensor [R, D] on the device."""
    if isinstance(features, torch.Tensor):
        part = features.detach()[torch.from_numpy(rows).to(features.device)].to(device, dtype)
    else:
        part = torch.from_numpy(features[rows]).to(device, dtype)
    if not torch.isfinite(part.sum()):
        wrong = (~torch.isfinite(part).all(dim=1)).nonzero().flatten()
        if len(wrong):  # else only the sum overflowed
            raise ValueError(f"row {rows[int(wrong[0])]} of the {name} features is not finite")
    return part


def _chunks(bounds, rows):
    """Yield ranges of classes `(first, last)` of at most `rows` images, or of one larger class."""
    first = 0
    while first < len(bounds) - 1:
        last = int(np.searchsorted(bounds, bounds[first] + rows, side="right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def _batches(counts, values):
    """Batch classes of similar size: yields arrays of positions in `counts`, the largest classes first.

    values: of an image's features, old and new together.
    """
    order = np.argsort(counts, kind="stable")
    ascending = counts[order]
    stop = len(order)
    while stop:
        largest = int(ascending[stop - 1])
        fit = max(1, BATCH_VALUES // (largest * (3 * largest + values)))
        start = max(int(np.searchsorted(ascending, ALIKE * largest)), stop - fit)
        yield order[start:stop]
        stop = start


def _refine_chunk(old, new, by_class, counts, damping, temperature):
    """Prototypes [K, D] of K classes; old [R, D], new [R, D'] (normalised), by_class: the rows, class by class."""
    device = old.device
    prototypes = torch.empty(len(counts), old.shape[1], dtype=old.dtype, device=device)
    offsets = torch.from_numpy(np.cumsum(counts) - counts).to(device)
    sizes = torch.from_numpy(counts).to(device)
    for picked in _batches(counts, old.shape[1] + new.shape[1]):
        place = torch.arange(int(counts[picked].max()), device=device)
        picked = torch.from_numpy(picked).to(device)
        valid = place < sizes[picked, None]  # [b, n]; smaller classes are padded
        index = by_class[offsets[picked, None] + torch.where(valid, place, 0)]
        values = old[index]
        there = valid & values.any(dim=2)  # a row of zeros is an image without an old feature; with none of them 0 is
        weights = image_weights(new[index], torch.where(there.any(1, True), there, valid), damping, temperature)
        prototypes[picked] = (weights.unsqueeze(1) @ values).squeeze(1)
    return prototypes


def image_weights(new, valid, damping, temperature):
    """Each image's weight in its class's prototype: w [b, n], rows sum to 1, padding 0.

    new: L2-normalised new features of b classes, padded to n images, [b, n, D]; valid: bool [b, n], False = padding or
    an image that is left out.
    """
    size = valid.sum(dim=1)
    itself = torch.eye(new.shape[1], dtype=torch.bool, device=new.device)
    # A class's only image has no neighbour; it keeps its feature.
    blocked = ~valid.unsqueeze(1) | (itself & (size > 1)[:, None, None])
    similarity = (new / temperature) @ new.mT
    transition = similarity.masked_fill_(blocked, float("-inf")).softmax(dim=2)  # E: rows sum to 1
    # No image moves to the padding, and its right-hand side is 0, so its weight is 0.
    system = itself.to(new.dtype) - damping * transition.mT
    walks = torch.linalg.solve(system, valid.to(new.dtype))
    return walks * ((1 - damping) / size.to(new.dtype)).unsqueeze(1)  # by int64 it would be float32
