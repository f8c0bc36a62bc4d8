"""MixBCT, EXdata: new r50, old features of softmax and 512 dimensions."""

from easydict import EasyDict as edict

config = edict()

config.scenario = "EXdata_softmax_f512"
config.credible_old_feature = "feature_save/EXdata/f512_r18_softmax_data100_credible_ratio_90_feature.npy"
