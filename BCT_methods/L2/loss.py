"""L2 loss: the distance of each image's new feature to its old one, and the weakened form.

A baseline of Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020, arXiv:2003.11942.
"""

import torch
import torch.nn.functional as F


def feature_l2_loss(new, old, threshold=0.0):
    """mean_i max(‖f_i − g_i‖₂ − threshold, 0).

    new: embeddings [B, D]; old: the same images' old features [B, D] on the same device. Both are L2-normalised here,
    to f and g. threshold: Euclidean distance between unit vectors, 0 to 2; nearer pairs cost nothing.

    Returns the mean over this batch, a scalar; float32 unless an input is float64. It is the norm, not its square:
    the gradient at f has length 1/B at any distance, and is 0 where f equals g or lies within the threshold.
    No gradient reaches `old`. Raises ValueError for mismatched shapes or a threshold out of range.
    """
    if new.shape != old.shape or new.ndim != 2:
        raise ValueError(
            f"new {list(new.shape)} and old features {list(old.shape)} must both be [B, D]; "
            "embedding_size must be the old model's"
        )
    if not 0 <= threshold <= 2:
        raise ValueError(f"threshold = {threshold} must be in [0, 2], the range of distances between unit vectors")
    dtype = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    new = F.normalize(new.to(dtype), dim=1)
    old = F.normalize(old.detach().to(dtype), dim=1)
    # vector_norm has gradient 0 at 0, where sqrt of the summed squares would give NaN.
    distance = torch.linalg.vector_norm(new - old, dim=1)
    return F.relu(distance - threshold).mean()
