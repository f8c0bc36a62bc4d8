"""LCE's two losses: class centres must lie where the old ones do, and features within the old classes' bounds.

Qiang Meng, Chixiang Zhang, Xiaoqiang Xu, Feng Zhou, "Learning Compatible Embeddings", ICCV 2021, arXiv:2108.01958.

Notation: Ŵ the centres of the new classifier and f the new feature of an image of class y, both `to_old_width`, ĉ the
normalised means of the old features by class, κ_y the smallest cosine of an old feature of class y to ĉ_y.
"""

import torch
import torch.nn.functional as F

from core.distributed import all_reduce_, sum_over_ranks
from losses.old_width import to_old_width, with_width


def center_alignment_loss(weight, old_centers):
    """mean over the d_old entries of all C old classes of (Ŵ − ĉ)², where the classes may be sharded over the ranks.

    weight: this rank's class centres [num_local, D]; old_centers: those of the same classes [num_local, d_old] on the
    same device. Both may have any scale; they are L2-normalised here. A row of zeros in old_centers is a class without
    old features: it does not count, and its centre gets no gradient.

    Returns the mean over the classes of *all* ranks, the same scalar on each; float32 unless an input is float64.
    Gradients go to `weight` alone: 2 (Ŵ − ĉ) / (C·d_old) at Ŵ. Raises ValueError for mismatched shapes.
    """
    if weight.ndim != 2 or old_centers.ndim != 2 or len(weight) != len(old_centers):
        raise ValueError(
            f"class centres {list(weight.shape)} and old ones {list(old_centers.shape)} must be [num_local, D] and "
            "[num_local, d_old]"
        )
    dtype = torch.promote_types(torch.promote_types(weight.dtype, old_centers.dtype), torch.float32)
    old = old_centers.detach().to(dtype)
    weight = with_width(weight.to(dtype), old.shape[1])
    # ‖Ŵ − ĉ‖² = 2 − 2 Ŵ·ĉ: a third of the time that normalised copies and their difference take.
    length, old_length = (torch.linalg.vector_norm(rows, dim=1) for rows in (weight, old))
    cosine = torch.linalg.vecdot(weight, old) / (length.clamp(min=1e-12) * old_length.clamp(min=1e-12))
    squared = torch.where(old_length > 0, 2 - 2 * cosine, 0)
    total, classes = sum_over_ranks(torch.stack([squared.sum(), (old_length > 0).sum().to(dtype)]))
    return total / (classes.clamp(min=1) * weight.shape[1])


def boundary_loss(new, labels, old_centers, min_cosine):
    """mean_i max(0, κ_y − f_i·ĉ_y): the cosine by which a new feature lies outside its old class.

    new: embeddings [B, D], any scale; labels: int64 [B]; old_centers [C, d_old], any scale, and min_cosine κ [C], all
    on one device. A class without old features, or of another rank, has a row of zeros and κ = −1: no image of it lies
    outside. Every rank passes the same images and its own classes.

    Returns this rank's part of the mean over the images whose class has a centre on some rank, a scalar, to be summed
    over the ranks; float32 unless the embeddings are float64. Gradients go to `new`. Raises ValueError for mismatched
    shapes.
    """
    if new.ndim != 2 or old_centers.ndim != 2 or len(labels) != len(new):
        raise ValueError(
            f"embeddings {list(new.shape)}, labels {list(labels.shape)} and old centres {list(old_centers.shape)} must "
            "be [B, D], [B] and [C, d_old]"
        )
    if min_cosine.shape != old_centers.shape[:1]:
        raise ValueError(f"min_cosine {list(min_cosine.shape)} must be [C], one a row of {list(old_centers.shape)}")
    dtype = torch.promote_types(new.dtype, torch.float32)
    centers = F.normalize(old_centers.detach()[labels].to(dtype), dim=1)
    cosine = (to_old_width(new.to(dtype), centers.shape[1]) * centers).sum(dim=1)
    counted = all_reduce_(centers.any(dim=1).sum())
    mean = F.relu(min_cosine.detach()[labels].to(dtype) - cosine).mean()
    return mean * (len(new) / counted.clamp(min=1).to(dtype))
