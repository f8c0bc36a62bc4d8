"""L2's own keys; configs/base.py and old_model/keys.py explain the others."""

from easydict import EasyDict as edict

from old_model.keys import keys

config = edict(keys)

config.network = "r50"
config.loss_weight = [1, 10]        # [w0, w1]: factors on the classification term and on the distance term
config.threshold = 0.0              # distance between unit vectors, 0 to 2, that costs nothing; weakened L2: 0.2
