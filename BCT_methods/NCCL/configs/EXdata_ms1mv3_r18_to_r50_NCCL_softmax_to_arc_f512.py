"""NCCL, EXdata: new r50, old features of softmax and 512 dimensions."""

from easydict import EasyDict as edict

config = edict()

config.scenario = "EXdata_softmax_f512"

# Published, on 8 ranks: 8 l1 (the backward of its gather multiplies by 8), no gradient from l2 (its gather cuts it).
config.alpha = 8.0
config.beta = 0.0
