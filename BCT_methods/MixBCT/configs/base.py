"""MixBCT's own keys; configs/base.py and old_model/keys.py explain the others."""

from easydict import EasyDict as edict

from old_model.keys import keys

config = edict(keys)

config.network = "r50"
config.mix_ratio = 0.3              # share of a batch whose new embeddings are replaced by old features, 0 to 1
config.credible_old_feature = ""    # .npy bool [num_image]: which old features may be mixed in; "" = all
