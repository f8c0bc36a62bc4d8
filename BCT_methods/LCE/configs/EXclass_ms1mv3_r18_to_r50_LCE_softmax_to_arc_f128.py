"""LCE, EXclass: new r50, old features of softmax and 128 dimensions."""

from easydict import EasyDict as edict

config = edict()

config.scenario = "EXclass_softmax_f128"
