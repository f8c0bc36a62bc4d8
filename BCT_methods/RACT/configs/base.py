"""RACT's own keys; configs/base.py and old_model/keys.py explain the others."""

from easydict import EasyDict as edict

from old_model.keys import keys

config = edict(keys)

config.network = "r50"
config.ract_weight = 1.0            # factor on the contrastive term
config.temperature = 0.01           # τ, divides the cosines of that term
config.negatives = 10               # hardest other images of the global batch, per image: as many old features, and new
config.negative_grad = False        # True: negatives among the new features get a gradient, too; published: none
