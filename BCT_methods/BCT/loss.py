"""BCT's influence loss: classify new features with a synthesised old classifier.

Yantao Shen, Yuanjun Xiong, Wei Xia, Stefano Soatto, "Towards Backward-Compatible Representation Learning", CVPR 2020,
arXiv:2003.11942. The term is in losses/prototype.py, since UniBCT uses it too, with its own prototypes.
"""

from losses.prototype import old_prototype_loss

__all__ = ["old_prototype_loss"]
