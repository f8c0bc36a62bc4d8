"""The influence loss of BCT: classify new features with a fixed classifier made of old ones.

Yantao Shen, Yuanjun Xiong, Wei Xia, Stefano Soatto, "Towards Backward-Compatible Representation Learning", CVPR 2020,
arXiv:2003.11942.
"""

import torch
import torch.nn.functional as F

from core.distributed import gather, gather_with_grad, rank, rows_of_rank, world_size
from losses.old_width import to_old_width
from losses.sharded import cross_entropy_of_known, local_labels


def old_prototype_loss(embeddings, labels, prototypes, scale=1.0):
    """Softmax cross-entropy over scale · f·Pᵀ, with f the unit new features and P the old prototypes.

    embeddings: new [B, D], any width: f is `to_old_width` of them. labels: int64 [B]. prototypes: P [C, d_old], one per
    class, used as they are (BCT: L2-normalised; UniBCT: raw means, whose norms act as a scale) and without gradient. A
    row of zeros is a class without old features: it is left out of the softmax, and its images have no term.
    scale: factor on f·Pᵀ, above 0. All on one device.

    Returns the mean over the terms of this batch, a scalar; float32 unless the embeddings are float64. Raises
    ValueError for mismatched shapes or an invalid scale.
    """
    logits, known = _logits(_unit(embeddings, prototypes, scale), prototypes, scale)
    labels = torch.where(known[labels], labels, -1)
    total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


def _unit(embeddings, prototypes, scale):
    if embeddings.ndim != 2 or prototypes.ndim != 2:
        raise ValueError(
            f"embeddings {list(embeddings.shape)} and prototypes {list(prototypes.shape)} must be [B, D] and [C, d_old]"
        )
    if scale <= 0:
        raise ValueError(f"scale = {scale} must be above 0")
    return to_old_width(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), prototypes.shape[1])


def _logits(features, prototypes, scale):
    """`(logits [B, C], known bool [C])`: lowest at the classes that have no prototype, which are not known."""
    prototypes = prototypes.detach()
    known = prototypes.any(dim=1)
    # The scale multiplies the B rows, not the B·C products.
    logits = (scale * features) @ prototypes.to(features.dtype).T
    # Not -inf: where a rank has no other class, its softmax would be NaN.
    return logits.masked_fill_(~known, torch.finfo(logits.dtype).min), known


class OldPrototypes(torch.nn.Module):
    """The old prototypes of this rank's classes, and `old_prototype_loss` over the classes of all ranks.

    The buffer `prototypes` is [num_local, width], zero until it is set to the rows `classes`, a slice, of all classes'
    prototypes. width: d_old, the old features'. stored: whether it is saved in checkpoints, each class once.
    forward: (embeddings [B, D], labels int64 [B], scale) of this rank -> the mean over the *global* batch.

    A rank holds d_old·C / R numbers for C classes on R ranks, and logits [R·B, C / R].
    """

    def __init__(self, num_classes, width, stored):
        super().__init__()
        start, stop = rows_of_rank(num_classes, rank(), world_size())
        self.classes = slice(start, stop)
        self.register_buffer("prototypes", torch.zeros(stop - start, width), persistent=stored)
        self.class_sharded = {"prototypes": 0} if stored else {}  # see losses/classifier.py

    def forward(self, embeddings, labels, scale=1.0):
        features = gather_with_grad(_unit(embeddings, self.prototypes, scale))
        local = local_labels(gather(labels), self.classes.start, len(self.prototypes))
        logits, known = _logits(features, self.prototypes, scale)
        return cross_entropy_of_known(logits, torch.where(known[local], local, -1))
