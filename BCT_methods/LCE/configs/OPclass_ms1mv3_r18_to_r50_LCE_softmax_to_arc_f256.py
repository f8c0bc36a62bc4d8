"""LCE, OPclass: new r50, old features of softmax and 256 dimensions."""

from easydict import EasyDict as edict

config = edict()

config.scenario = "OPclass_softmax_f256"
