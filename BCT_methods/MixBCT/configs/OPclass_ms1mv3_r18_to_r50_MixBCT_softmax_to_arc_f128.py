"""MixBCT, OPclass: new r50, old features of softmax and 128 dimensions."""

from easydict import EasyDict as edict

config = edict()

config.scenario = "OPclass_softmax_f128"
config.credible_old_feature = "feature_save/OPclass/f128_r18_softmax_class70_credible_ratio_90_feature.npy"
