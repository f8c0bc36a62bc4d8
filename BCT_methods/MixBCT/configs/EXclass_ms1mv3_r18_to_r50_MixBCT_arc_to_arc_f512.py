"""MixBCT, EXclass: new r50, old features of arc and 512 dimensions."""

from easydict import EasyDict as edict

config = edict()

config.scenario = "EXclass_arc_f512"
config.credible_old_feature = "feature_save/EXclass/f512_r18_arc_class100_credible_ratio_90_feature.npy"
