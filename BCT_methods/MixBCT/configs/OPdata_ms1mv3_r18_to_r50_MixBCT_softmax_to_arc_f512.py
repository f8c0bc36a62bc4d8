"""MixBCT, OPdata: new r50, old features of softmax and 512 dimensions."""

from easydict import EasyDict as edict

config = edict()

config.scenario = "OPdata_softmax_f512"
config.credible_old_feature = "feature_save/OPdata/f512_r18_softmax_data70_credible_ratio_90_feature.npy"
