"""RACT, OPclass: new r50, old features of arc and 512 dimensions."""

from easydict import EasyDict as edict

config = edict()

config.scenario = "OPclass_arc_f512"
