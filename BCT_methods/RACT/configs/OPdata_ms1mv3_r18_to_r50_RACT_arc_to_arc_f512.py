"""RACT, OPdata: new r50, old features of arc and 512 dimensions."""

from easydict import EasyDict as edict

config = edict()

config.scenario = "OPdata_arc_f512"
