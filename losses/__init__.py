"""Margin softmax losses: the margins, and the class-sharded softmax that they are used in."""

from losses.margin import ArcFace, CombinedMarginLoss, CosFace
from losses.partial_fc import PartialFC

__all__ = ["ArcFace", "CombinedMarginLoss", "CosFace", "PartialFC"]
