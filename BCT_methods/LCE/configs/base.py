"""LCE's own keys; configs/base.py and old_model/keys.py explain the others."""

from easydict import EasyDict as edict

from old_model.keys import keys

config = edict(keys)

config.network = "r50"
config.align_weight = 100.0         # factor on the alignment of class centres, a mean over all num_classes ×
                                    # d_old entries: the more classes, the weaker the pull on each
config.boundary_weight = 1.0        # factor on the boundary term
