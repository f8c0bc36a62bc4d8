"""MixBCT's own keys. They are over configs/base.py, which explains the others."""

from easydict import EasyDict as edict

config = edict()

config.network = "r50"
config.mix_ratio = 0.3              # share of a batch whose new embeddings are replaced by old features, 0 to 1

# What tools/get_feature/ left behind of the old model on this run's training set.
config.old_embedding = ""           # .npy float32 [num_image, embedding_size], row i = image i of rec
config.old_embedding_label = ""     # .npy int64 [num_image]
config.credible_old_feature = ""    # .npy bool [num_image]: which old features may be mixed in; "" = all
config.old_model_path = ""          # the old model's model.pt; not needed, old features come from old_embedding.
                                    # Stated, the run refuses files of old features that are older than it
