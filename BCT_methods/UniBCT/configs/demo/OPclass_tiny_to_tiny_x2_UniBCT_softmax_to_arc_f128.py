"""UniBCT, OPclass: new tiny_x2, old features of softmax and 128 dimensions."""

from easydict import EasyDict as edict

config = edict()

config.scenario = "demo_OPclass_softmax_f128"
config.network = "tiny_x2"

# The method's epochs, scaled from 35 to 24.
config.compat_start_epoch = 7
config.refine_epochs = [7, 14]
config.decay_epoch = [14, 18, 22]
