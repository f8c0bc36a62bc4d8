"""Comparing new features with old ones of another width: every old-side term and every cross-test does it alike.

A deployed gallery is stored and stays as it is. So of a wider new feature its first d_old coordinates are compared, a
narrower one is padded with zeros, and old features are never cut:

    q = f[:d_old] / ‖f[:d_old]‖   or   (f, 0) / ‖f‖

A new model's own comparisons, the self-test, use the whole feature.
"""

import torch.nn.functional as F


def with_width(features, width):
    """The first `width` coordinates of features [N, D], or all of them and zeros: [N, width]. No copy if D is it."""
    own = features.shape[1]
    if own == width:
        return features
    return features[:, :width] if own > width else F.pad(features, (0, width - own))


def part_compared(width, old_width):
    """In words, for users, how new features of `width` are compared with old ones of another width."""
    return f"by the first {old_width} coordinates" if width > old_width else "padded with zeros"


def to_old_width(features, old_width):
    """New features [N, D], any scale -> what is compared with old ones: [N, old_width], L2-normalised, with gradient.

    A float tensor in the dtype of the result. Rows whose first old_width coordinates are all zero stay zero.
    """
    return F.normalize(with_width(features, old_width), dim=1)
