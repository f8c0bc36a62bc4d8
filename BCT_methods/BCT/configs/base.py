"""BCT's own keys; configs/base.py explains the others."""

from easydict import EasyDict as edict

config = edict()

config.network = "r50"
config.scale = 1.0                  # factor on the cosines of new features and prototypes; 16 pulls harder than 1

# Written by tools/get_feature/get_avg_feature.py for this run's training set.
config.old_prototype = ""           # .npy float32 [num_classes, d_old], row c = mean old feature of class c
config.old_model_path = ""          # the old model's model.pt; if it is there, old_prototype must be made from it
