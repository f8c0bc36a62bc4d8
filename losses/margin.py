"""Margins for the softmax losses of face recognition: cosines in, scaled logits out.

Each changes one entry per row, the cosine to the sample's own class, and multiplies everything by a scale s. So the
trigonometry runs on [B] numbers in float32 (float64 for float64 input), the [B, C] matrix is read once in the forward
and once in the backward pass, and the derivative at the target is the closed form below, which stays finite where
arccos's does not: at |cos theta| = 1, and slightly beyond it through rounding.

    d/dc cos(m1 arccos(c) + m2) = m1 sin(m1 theta + m2) / sin(theta),    c = cos(theta)
"""

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# The derivative divides by max(sin(theta), SIN_FLOOR): exact above 0.06 degrees. Below, the factor grows without bound
# while the gradient of the cosine itself vanishes like sin(theta), which would leave amplified rounding errors.
SIN_FLOOR = 1e-3


class _ApplyMargin(torch.autograd.Function):
    """logits [B, C] -> s * logits, with target entries replaced and filtered entries zero, without gradient."""

    @staticmethod
    def forward(ctx, logits, labels, margin):
        here = labels >= 0
        column = labels.clamp(min=0).unsqueeze(1)  # any column will do for a row without a target
        cosine = logits.gather(1, column).squeeze(1)
        value, slope = margin.target(cosine if cosine.dtype == torch.float64 else cosine.float())
        value = torch.where(here, value.to(logits.dtype), cosine)
        slope = torch.where(here, slope, torch.ones_like(slope))

        out = logits * margin.s
        filtered = None
        if margin.interclass_filtering_threshold > 0:
            filtered = logits > margin.interclass_filtering_threshold
            # The target is never filtered; a row without a target here keeps the value of its column 0.
            filtered.scatter_(1, column, filtered.gather(1, column) & ~here.unsqueeze(1))
            value = torch.where(filtered.gather(1, column).squeeze(1), torch.zeros_like(value), value)
            out.masked_fill_(filtered, 0)
        out.scatter_(1, column, (value * margin.s).unsqueeze(1))
        ctx.save_for_backward(column, slope, filtered)
        ctx.s = margin.s
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        column, slope, filtered = ctx.saved_tensors
        out = grad * ctx.s
        target = out.gather(1, column).squeeze(1) * slope
        out.scatter_(1, column, target.to(out.dtype).unsqueeze(1))
        if filtered is not None:
            out.masked_fill_(filtered, 0)
        return out, None, None


class Margin(nn.Module):
    """Base class; a subclass defines `target(cosine) -> (value, derivative)` for [B] cosines."""

    def __init__(self, s, interclass_filtering_threshold=0.0):
        super().__init__()
        if not s > 0:
            raise ValueError(f"the scale s must be positive, not {s}")
        self.s = float(s)
        self.interclass_filtering_threshold = float(interclass_filtering_threshold)

    def forward(self, logits, labels):
        """Scaled logits with the margin at the target entries.

        logits: [B, C], cosines in [-1, 1] (rounding beyond is tolerated), any floating-point dtype; not modified.
        labels: integers [B] or [B, 1], the column of each row's own class; -1 = the class is on another rank, the row
        is only scaled. Returns [B, C], same dtype. Raises ValueError if the shapes do not match.
        """
        labels = labels.reshape(-1)
        if logits.dim() != 2 or len(labels) != len(logits):
            raise ValueError(
                f"logits {tuple(logits.shape)} and labels [{len(labels)}] do not match: expected [B, C] and [B]"
            )
        return _ApplyMargin.apply(logits, labels.long(), self)

    def target(self, cosine):
        raise TypeError(f"{type(self).__name__} must define target(cosine)")


class ArcFace(Margin):
    """Additive angular margin (ArcFace, arXiv:1801.07698, eq. 3): s * cos(theta + margin) at the target.

    For theta + margin > pi the cosine would rise again and push a sample away from its class. There, i.e. for
    cos(theta) <= cos(pi - margin), the target is s * (cos(theta) - margin * sin(pi - margin)), which keeps falling:
    it is below the first branch for margins up to pi / 2, and its derivative with respect to the cosine is s.

    s: scale. margin: radians in [0, pi).
    """

    def __init__(self, s=64.0, margin=0.5):
        super().__init__(s)
        self.margin = _angle("margin", margin)

    def target(self, cosine):
        return _arcface(cosine, self.margin)

    def extra_repr(self):
        return f"s={self.s:g}, margin={self.margin:g}"


class CosFace(Margin):
    """Additive cosine margin (CosFace, arXiv:1801.09414, eq. 4): s * (cos(theta) - m) at the target.

    s: scale. m: cosine.
    """

    def __init__(self, s=64.0, m=0.40):
        super().__init__(s)
        self.m = float(m)

    def target(self, cosine):
        return cosine - self.m, torch.ones_like(cosine)

    def extra_repr(self):
        return f"s={self.s:g}, m={self.m:g}"


class CombinedMarginLoss(Margin):
    """The combined margin (arXiv:1801.07698, eq. 4): s * (cos(m1 * theta + m2) - m3) at the target.

    m1 is SphereFace's multiplicative angular margin (arXiv:1704.08063), m2 ArcFace's, m3 CosFace's.
    m1 = 1, m3 = 0 is ArcFace, with its second branch past pi - m2; m1 = 1, m2 = 0 is CosFace. All other combinations
    use the plain formula, even where m1 * theta + m2 exceeds pi and the cosine rises again: choose m1 and m2 so that
    the angles of a trained model, well below pi / 2, stay clear of that.

    s: scale. m1: factor, usually >= 1. m2: radians in [0, pi). m3: cosine.
    interclass_filtering_threshold: cosines to *other* classes above it are set to 0, which makes them nearly
    irrelevant, and get no gradient: probably one person under two labels (Partial FC, arXiv:2203.15565). 0 = off.
    """

    def __init__(self, s, m1, m2, m3, interclass_filtering_threshold=0):
        super().__init__(s, interclass_filtering_threshold)
        self.m1, self.m2, self.m3 = float(m1), _angle("m2", m2), float(m3)

    def target(self, cosine):
        if self.m1 == 1 and self.m2 == 0:
            return cosine - self.m3, torch.ones_like(cosine)
        if self.m1 == 1 and self.m3 == 0:
            return _arcface(cosine, self.m2)
        theta, sine = _angle_and_sine(cosine)
        moved = self.m1 * theta + self.m2
        return moved.cos() - self.m3, self.m1 * moved.sin() / sine.clamp(min=SIN_FLOOR)

    def extra_repr(self):
        numbers = f"s={self.s:g}, m1={self.m1:g}, m2={self.m2:g}, m3={self.m3:g}"
        return f"{numbers}, interclass_filtering_threshold={self.interclass_filtering_threshold:g}"


def _arcface(cosine, margin):
    """`(value, derivative)` of ArcFace's target for [B] cosines, both branches."""
    theta, sine = _angle_and_sine(cosine)
    moved = theta + margin
    before = cosine > math.cos(math.pi - margin)
    value = torch.where(before, moved.cos(), cosine - margin * math.sin(math.pi - margin))
    slope = torch.where(before, moved.sin() / sine.clamp(min=SIN_FLOOR), torch.ones_like(cosine))
    return value, slope


def _angle_and_sine(cosine):
    theta = cosine.clamp(-1, 1).acos()
    return theta, theta.sin()


def _angle(name, value):
    if not 0 <= value < math.pi:
        raise ValueError(f"{name} is an angle in radians, at least 0 and below pi, not {value}")
    return float(value)
