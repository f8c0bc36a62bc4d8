"""Shared losses: margin softmax, sharded over the classes, and softmax over old prototypes."""

from losses.classifier import Classifier, Softmax
from losses.margin import ArcFace, CombinedMarginLoss, CosFace
from losses.old_width import part_compared, to_old_width, with_width
from losses.partial_fc import PartialFC
from losses.prototype import OldPrototypes, old_prototype_loss

__all__ = [
    "ArcFace",
    "Classifier",
    "CombinedMarginLoss",
    "CosFace",
    "OldPrototypes",
    "PartialFC",
    "Softmax",
    "old_prototype_loss",
    "part_compared",
    "to_old_width",
    "with_width",
]
