"""Classify new features by the old classifier: the influence loss of BCT, with a synthesised old classifier.

Yantao Shen, Yuanjun Xiong, Wei Xia, Stefano Soatto, "Towards Backward-Compatible Representation Learning", CVPR 2020,
arXiv:2003.11942. The term is in losses/prototype.py, for UniBCT takes it over with prototypes of its own.
"""

from losses.prototype import old_prototype_loss

__all__ = ["old_prototype_loss"]
