"""The influence loss of BCT: classify new features with a fixed classifier made of old ones.

Yantao Shen, Yuanjun Xiong, Wei Xia, Stefano Soatto, "Towards Backward-Compatible Representation Learning", CVPR 2020,
arXiv:2003.11942.
"""

import torch
import torch.nn.functional as F

from core.distributed import gather, gather_with_grad, rank, rows_of_rank, world_size
from losses.sharded import local_labels, sharded_cross_entropy


def old_prototype_loss(embeddings, labels, prototypes, scale=1.0):
    """Softmax cross-entropy over scale · f·Pᵀ, with f the unit new features and P the old prototypes.

    embeddings: new [B, D], L2-normalised here to f. labels: int64 [B]. prototypes: P [C, D], one per class, used as
    they are (BCT: L2-normalised; UniBCT: raw means, whose norms act as a scale) and without gradient.
    scale: factor on f·Pᵀ, above 0. All on one device.

    Returns the mean over this batch, a scalar; float32 unless the embeddings are float64. Raises ValueError for
    mismatched shapes or an invalid scale.
    """
    return F.cross_entropy(_logits(_unit(embeddings, prototypes, scale), prototypes, scale), labels)


def _unit(embeddings, prototypes, scale):
    if embeddings.ndim != 2 or prototypes.ndim != 2 or embeddings.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"embeddings {list(embeddings.shape)} and prototypes {list(prototypes.shape)} must be [B, D] and [C, D]; "
            "set embedding_size to the old model's"
        )
    if scale <= 0:
        raise ValueError(f"scale = {scale} must be above 0")
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)


def _logits(features, prototypes, scale):
    # The scale multiplies the B rows, not the B·C products.
    return (scale * features) @ prototypes.detach().to(features.dtype).T


class OldPrototypes(torch.nn.Module):
    """The old prototypes of this rank's classes, and `old_prototype_loss` over the classes of all ranks.

    The buffer `prototypes` is [num_local, D], zero until it is set to the rows `classes`, a slice, of all classes'
    prototypes. stored: whether it is saved in checkpoints, each class once.
    forward: (embeddings [B, D], labels int64 [B], scale) of this rank -> the mean over the *global* batch.

    A rank holds D·C / R numbers for C classes on R ranks, and logits [R·B, C / R].
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
        return sharded_cross_entropy(_logits(features, self.prototypes, scale), local)
