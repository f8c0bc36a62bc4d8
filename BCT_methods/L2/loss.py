"""L2 loss: the distance of each image's new feature to its old one, and the weakened form.

A baseline of Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020, arXiv:2003.11942.
"""

import torch
import torch.nn.functional as F

from core.distributed import mean_of_counted
from losses.old_width import to_old_width


def feature_l2_loss(new, old, threshold=0.0):
    """mean_i max(‖f_i − g_i‖₂ − threshold, 0).

    new: embeddings [B, D], any width: f is `to_old_width` of them; old: the same images' old features [B, d_old] on the
    same device, L2-normalised here to g. threshold: Euclidean distance between unit vectors, 0 to 2; nearer pairs cost
    nothing.

    Returns the mean over the *global* batch without the images that have no old feature, a row of zeros: a scalar, the
    same on all ranks; float32 unless an input is float64. It is the norm, not its square:
    the gradient at f has length 1/B at any distance, and is 0 where f equals g or lies within the threshold.
    No gradient reaches `old`. Raises ValueError for mismatched shapes or a threshold out of range.
    """
    if new.ndim != 2 or old.ndim != 2 or len(new) != len(old):
        raise ValueError(f"new {list(new.shape)} and old features {list(old.shape)} must be [B, D] and [B, d_old]")
    if not 0 <= threshold <= 2:
        raise ValueError(f"threshold = {threshold} must be in [0, 2], the range of distances between unit vectors")
    dtype = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    new = to_old_width(new.to(dtype), old.shape[1])
    old = F.normalize(old.detach().to(dtype), dim=1)
    # vector_norm has gradient 0 at 0, where sqrt of the summed squares would give NaN.
    distance = torch.linalg.vector_norm(new - old, dim=1)
    counted = old.any(dim=1)
    return mean_of_counted(torch.where(counted, F.relu(distance - threshold), 0).sum(), counted.sum())
