"""LCE's two losses: class centres must lie where the old ones do, and features within the old classes' bounds.

Qiang Meng, Chixiang Zhang, Xiaoqiang Xu, Feng Zhou, "Learning Compatible Embeddings", ICCV 2021, arXiv:2108.01958.

Notation: Ŵ the normalised centres of the new classifier, ĉ the normalised means of the old features by class, f the
normalised new feature of an image of class y, κ_y the smallest cosine of an old feature of class y to ĉ_y.
"""

import torch
import torch.nn.functional as F

from core.distributed import sum_over_ranks


def center_alignment_loss(weight, old_centers):
    """mean over all C·D entries of (Ŵ − ĉ)², where the classes may be sharded over the ranks.

    weight: this rank's class centres [num_local, D]; old_centers: those of the same classes [num_local, D] on the same
    device. Both may have any scale; they are L2-normalised here. A row of zeros in old_centers is a class without old
    images: it adds 0, and its centre gets no gradient.

    Returns the mean over the classes of *all* ranks, the same scalar on each; float32 unless an input is float64.
    Gradients go to `weight` alone: 2 (Ŵ − ĉ) / (C·D) at Ŵ. Raises ValueError for mismatched shapes.
    """
    if weight.shape != old_centers.shape or weight.ndim != 2:
        raise ValueError(
            f"class centres {list(weight.shape)} and old ones {list(old_centers.shape)} must both be [num_local, D]; "
            "embedding_size must be the old model's"
        )
    dtype = torch.promote_types(torch.promote_types(weight.dtype, old_centers.dtype), torch.float32)
    weight, old = weight.to(dtype), old_centers.detach().to(dtype)
    # ‖Ŵ − ĉ‖² = 2 − 2 Ŵ·ĉ: a third of the time that normalised copies and their difference take.
    length, old_length = (torch.linalg.vector_norm(rows, dim=1) for rows in (weight, old))
    cosine = torch.linalg.vecdot(weight, old) / (length.clamp(min=1e-12) * old_length.clamp(min=1e-12))
    squared = torch.where(old_length > 0, 2 - 2 * cosine, 0)
    total, classes = sum_over_ranks(torch.stack([squared.sum(), squared.new_full((), len(weight))]))
    return total / (classes * weight.shape[1])


def boundary_loss(new, labels, old_centers, min_cosine):
    """mean_i max(0, κ_y − f_i·ĉ_y): the cosine by which a new feature lies outside its old class.

    new: embeddings [B, D], any scale; labels: int64 [B]; old_centers [C, D], any scale, and min_cosine κ [C], all on
    one device. A class without old images has a row of zeros and κ = −1: no image of it lies outside.

    Returns the mean over these images, a scalar; float32 unless the embeddings are float64. Gradients go to `new`.
    Raises ValueError for mismatched shapes.
    """
    if new.ndim != 2 or old_centers.ndim != 2 or new.shape[1] != old_centers.shape[1] or len(labels) != len(new):
        raise ValueError(
            f"embeddings {list(new.shape)}, labels {list(labels.shape)} and old centres {list(old_centers.shape)} must "
            "be [B, D], [B] and [C, D]; embedding_size must be the old model's"
        )
    if min_cosine.shape != old_centers.shape[:1]:
        raise ValueError(f"min_cosine {list(min_cosine.shape)} must be [C], one a row of {list(old_centers.shape)}")
    dtype = torch.promote_types(new.dtype, torch.float32)
    centers = F.normalize(old_centers.detach()[labels].to(dtype), dim=1)
    cosine = (F.normalize(new.to(dtype), dim=1) * centers).sum(dim=1)
    return F.relu(min_cosine.detach()[labels].to(dtype) - cosine).mean()
