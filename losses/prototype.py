"""The influence loss of BCT: classify new features with a fixed classifier made of old ones.

Yantao Shen, Yuanjun Xiong, Wei Xia, Stefano Soatto, "Towards Backward-Compatible Representation Learning", CVPR 2020,
arXiv:2003.11942.
"""

import torch
import torch.nn.functional as F


def old_prototype_loss(embeddings, labels, prototypes, scale=1.0):
    """Softmax cross-entropy over scale · f·Pᵀ, with f the unit new features and P the old prototypes.

    embeddings: new [B, D], L2-normalised here to f. labels: int64 [B]. prototypes: P [C, D], one per class, used as
    they are (BCT: L2-normalised; UniBCT: raw means, whose norms act as a scale) and without gradient.
    scale: factor on f·Pᵀ, above 0. All on one device.

    Returns the mean over this batch, a scalar; float32 unless the embeddings are float64. Raises ValueError for
    mismatched shapes or an invalid scale.
    """
    if embeddings.ndim != 2 or prototypes.ndim != 2 or embeddings.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"embeddings {list(embeddings.shape)} and prototypes {list(prototypes.shape)} must be [B, D] and [C, D]; "
            "set embedding_size to the old model's"
        )
    if scale <= 0:
        raise ValueError(f"scale = {scale} must be above 0")
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    features = F.normalize(embeddings.to(dtype), dim=1)
    # The scale multiplies the B rows, not the B·C products.
    return F.cross_entropy((scale * features) @ prototypes.detach().to(dtype).T, labels)
