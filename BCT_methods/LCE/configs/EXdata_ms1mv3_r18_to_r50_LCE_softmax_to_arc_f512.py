"""LCE, EXdata: new r50, old features of softmax and 512 dimensions."""

from easydict import EasyDict as edict

config = edict()

config.scenario = "EXdata_softmax_f512"
