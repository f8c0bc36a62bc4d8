"""RACT's loss: a new feature must be nearer to its own old feature than to other people's, old and new alike.

Binjie Zhang et al., "Hot-Refresh Model Upgrades with Regression-Alleviating Compatible Training in Image Retrieval",
ICLR 2022, arXiv:2201.09724.
"""

import torch
import torch.nn.functional as F

from core.distributed import gather, gather_with_grad, mean_of_counted
from losses.old_width import to_old_width

IGNORED = -100  # target of an image without a term


def ract_loss(new, old, labels, temperature=0.01, negatives=10, negative_grad=False):
    """mean_i −log [e^{q_i·g_i/τ} / (e^{q_i·g_i/τ} + Σ_{k ∈ O(i)} e^{q_i·g_k/τ} + Σ_{k ∈ N(i)} e^{f_i·f_k/τ})].

    f, g: the L2-normalised new and old features; q: `to_old_width` of the new ones, f itself at equal width; O(i) and
    N(i): the `negatives` images of other classes in the global batch with the largest q_i·g_k and f_i·f_k, or all if
    there are fewer; an image without any costs nothing. An image without an old feature, a row of zeros, is in no O(i)
    and has no term.

    new: embeddings [B, D]; old: the same images' old features [B, d_old]; any scale, on one device. labels: int64 [B].
    All are this rank's rows; B is the same on every rank. temperature: τ, above 0. negatives: at least 1.
    negative_grad: False = f_k is constant, as published; True = it gets its gradient, on its own rank. No gradient
    reaches `old`.

    Returns the mean over the terms of the *global* batch, a scalar, the same on all ranks; float32 unless an input is
    float64.
    Raises ValueError for mismatched shapes or values out of range.
    """
    if new.ndim != 2 or old.ndim != 2 or not len(new) == len(old) == len(labels):
        raise ValueError(
            f"new {list(new.shape)} and old features {list(old.shape)} must be [B, D] and [B, d_old], labels "
            f"{list(labels.shape)} [B]"
        )
    if not temperature > 0 or negatives < 1:
        raise ValueError(f"temperature = {temperature} must be above 0 and negatives = {negatives} at least 1")
    dtype = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    whole = new.to(dtype)
    new = F.normalize(whole, dim=1)
    query = new if whole.shape == old.shape else to_old_width(whole, old.shape[1])
    old = F.normalize(old.detach().to(dtype), dim=1)
    same = labels[:, None] == gather(labels)  # [B, world·B]
    scores = [(query * old).sum(dim=1, keepdim=True)]
    counted = old.any(dim=1)
    of_old = query, gather(old), same | ~gather(counted)
    of_new = new, gather_with_grad(new) if negative_grad else gather(new), same
    for own, others, left_out in (of_old, of_new):
        foreign = (own @ others.T).masked_fill(left_out, float("-inf"))
        scores.append(foreign.topk(min(negatives, len(others)), dim=1).values)
    scores = torch.cat(scores, dim=1) / temperature  # the positive first
    target = torch.where(counted, 0, IGNORED)
    total = F.cross_entropy(scores, target, ignore_index=IGNORED, reduction="sum")
    return mean_of_counted(total, counted.sum())
