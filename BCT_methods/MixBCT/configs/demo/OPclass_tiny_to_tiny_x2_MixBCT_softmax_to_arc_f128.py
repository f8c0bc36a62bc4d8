"""MixBCT, OPclass: new tiny_x2, old features of softmax and 128 dimensions."""

from easydict import EasyDict as edict

config = edict()

config.scenario = "demo_OPclass_softmax_f128"
config.network = "tiny_x2"
config.credible_old_feature = "feature_save/OPclass/f128_tiny_softmax_class70_credible_ratio_90_feature.npy"
