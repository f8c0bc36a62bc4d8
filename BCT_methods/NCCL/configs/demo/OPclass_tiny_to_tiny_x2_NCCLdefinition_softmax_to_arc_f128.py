"""NCCLdefinition, OPclass: new tiny_x2, old features of softmax and 128 dimensions; both losses, as written."""

from easydict import EasyDict as edict

config = edict()

config.scenario = "demo_OPclass_softmax_f128"
config.network = "tiny_x2"
config.alpha = 1.0
config.beta = 0.01
