"""RACT's loss: a new feature must be nearer to its own old feature than to other people's, old and new alike.

Binjie Zhang et al., "Hot-Refresh Model Upgrades with Regression-Alleviating Compatible Training in Image Retrieval",
ICLR 2022, arXiv:2201.09724.
"""

import torch
import torch.nn.functional as F

from core.distributed import gather, gather_with_grad, global_mean


def ract_loss(new, old, labels, temperature=0.01, negatives=10, negative_grad=False):
    """mean_i −log [e^{f_i·g_i/τ} / (e^{f_i·g_i/τ} + Σ_{k ∈ O(i)} e^{f_i·g_k/τ} + Σ_{k ∈ N(i)} e^{f_i·f_k/τ})].

    f, g: the L2-normalised new and old features; O(i) and N(i): the `negatives` images of other classes in the global
    batch with the largest f_i·g_k and f_i·f_k, or all if there are fewer; an image without any costs nothing.

    new: embeddings [B, D]; old: the same images' old features [B, D]; both of any scale, on one device. labels: int64
    [B]. All are this rank's rows; B is the same on every rank. temperature: τ, above 0. negatives: at least 1.
    negative_grad: False = f_k is constant, as published; True = it gets its gradient, on its own rank. No gradient
    reaches `old`.

    Returns the mean over the *global* batch, a scalar, the same on all ranks; float32 unless an input is float64.
    Raises ValueError for mismatched shapes or values out of range.
    """
    if new.shape != old.shape or new.ndim != 2 or labels.shape != new.shape[:1]:
        raise ValueError(
            f"new {list(new.shape)} and old features {list(old.shape)} must both be [B, D], labels "
            f"{list(labels.shape)} [B]; embedding_size must be the old model's"
        )
    if not temperature > 0 or negatives < 1:
        raise ValueError(f"temperature = {temperature} must be above 0 and negatives = {negatives} at least 1")
    dtype = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    new = F.normalize(new.to(dtype), dim=1)
    old = F.normalize(old.detach().to(dtype), dim=1)
    same = labels[:, None] == gather(labels)  # [B, world·B]
    scores = [(new * old).sum(dim=1, keepdim=True)]
    for others in (gather(old), gather_with_grad(new) if negative_grad else gather(new)):
        foreign = (new @ others.T).masked_fill(same, float("-inf"))
        scores.append(foreign.topk(min(negatives, len(others)), dim=1).values)
    scores = torch.cat(scores, dim=1) / temperature  # the positive first
    return global_mean(F.cross_entropy(scores, torch.zeros_like(labels)))
