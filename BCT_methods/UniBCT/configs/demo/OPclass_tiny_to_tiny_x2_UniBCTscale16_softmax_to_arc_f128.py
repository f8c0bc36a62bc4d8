"""UniBCTscale16, OPclass: new tiny_x2, old features of softmax and 128 dimensions; scale 16."""

from easydict import EasyDict as edict

config = edict()

config.scenario = "demo_OPclass_softmax_f128"
config.network = "tiny_x2"

# The method's epochs, for 24 of them in place of 35.
config.compat_start_epoch = 7
config.refine_epochs = [7, 14]
config.decay_epoch = [14, 18, 22]
config.scale = 16.0
