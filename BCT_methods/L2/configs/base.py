"""L2's own keys. They are over configs/base.py, which explains the others."""

from easydict import EasyDict as edict

config = edict()

config.network = "r50"
config.loss_weight = [1, 10]        # [w0, w1]: factors on the classification term and on the distance term
config.threshold = 0.0              # distance between unit vectors, 0 to 2, that costs nothing; weakened L2: 0.2

# What tools/get_feature/get_feature.py left behind of the old model on this run's training set.
config.old_embedding = ""           # .npy float32 [num_image, embedding_size], row i = image i of rec
config.old_embedding_label = ""     # .npy int64 [num_image]
config.old_model_path = ""          # the old model's model.pt; not needed, old features come from old_embedding.
                                    # Stated, the run refuses files of old features that are older than it
