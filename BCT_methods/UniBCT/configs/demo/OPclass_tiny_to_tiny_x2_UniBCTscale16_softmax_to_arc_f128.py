"""Demo: new tiny_x2 on the 70 % of the identities that the old model never saw; scale 16.

Old model: configs/demo/f128_tiny_softmax_class30.py.
"""

from easydict import EasyDict as edict

config = edict()

config.network = "tiny_x2"
config.rec = "dataset/ms1m-retinaface-t1/train_part_70_class.rec"
config.old_embedding = "feature_save/OPclass/f128_tiny_softmax_class70_feature.npy"
config.old_embedding_label = "feature_save/OPclass/f128_tiny_softmax_class70_label.npy"

# The method's epochs, for 24 of them in place of 35.
config.compat_start_epoch = 7
config.refine_epochs = [7, 14]
config.decay_epoch = [14, 18, 22]
config.scale = 16.0
