"""BCT's own keys. They are over configs/base.py, which explains the others."""

from easydict import EasyDict as edict

config = edict()

config.network = "r50"
config.scale = 1.0                  # factor on the cosines of new features and prototypes; 16 pulls harder than 1

# What tools/get_feature/get_avg_feature.py left behind of the old model on this run's training set.
config.old_prototype = ""           # .npy float32 [num_classes, embedding_size], row c = mean old feature of class c
config.old_model_path = ""          # the old model's model.pt; not needed, old features come from old_prototype.
                                    # Stated, the run refuses files of old features that are older than it
