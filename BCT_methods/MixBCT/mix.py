"""MixBCT's one idea: replace some new features by old ones and train one classifier on both.

Yu Liang et al., "MixBCT: Towards Self-Adapting Backward-Compatible Training", arXiv:2308.06948.
"""

import torch
import torch.nn.functional as F

from core.distributed import to_device
from losses.old_width import with_width


def mix_old_features(embeddings, old_features, credible, mix_ratio, generator=None):
    """Replace int(B · mix_ratio) random credible rows of a batch by their old features.

    embeddings: new features [B, d_new]. old_features: the same images' old features [B, d_old], any scale, on the same
    device. The narrower ones are padded with zeros to D = max(d_new, d_old).
    credible: bool [B], on the CPU: images whose old feature may be used. mix_ratio: in [0, 1]. generator: a CPU
    torch.Generator; None = torch's own.

    Returns [B, D] in the embeddings' dtype and device: replaced rows are L2-normalised old features without gradient,
    the others the embeddings themselves, with gradient (the classifier normalises all rows). With fewer credible rows
    all of them are replaced. Raises ValueError for mismatched shapes or a ratio out of range.
    """
    if embeddings.ndim != 2 or old_features.ndim != 2 or len(old_features) != len(embeddings):
        raise ValueError(
            f"embeddings {list(embeddings.shape)} and old features {list(old_features.shape)} must be [B, d_new] and "
            "[B, d_old]"
        )
    if credible.shape != embeddings.shape[:1] or credible.dtype != torch.bool:
        raise ValueError(f"credible must be bool [{len(embeddings)}], not {credible.dtype} {list(credible.shape)}")
    if not 0 <= mix_ratio <= 1:
        raise ValueError(f"mix_ratio = {mix_ratio} must be in [0, 1]")

    # Drawn on the CPU: the same rows on any device, and no wait for the GPU.
    candidates = credible.nonzero().flatten()
    order = torch.randperm(len(candidates), generator=generator)
    drawn = candidates[order[: int(len(embeddings) * mix_ratio)]]

    drawn = to_device(drawn, embeddings.device)
    old = F.normalize(old_features.detach()[drawn].float(), dim=1)
    width = max(embeddings.shape[1], old.shape[1])
    embeddings, old = with_width(embeddings, width), with_width(old, width)
    return embeddings.index_copy(0, drawn, old.to(embeddings.dtype))
