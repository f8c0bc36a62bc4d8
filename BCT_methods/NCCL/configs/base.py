"""NCCL's own keys. They are over configs/base.py, which explains the others.

alpha and beta are those of the written definition; the ms1mv3 configs and the demo's set the published run's, 8 and 0.
"""

from easydict import EasyDict as edict

config = edict()

config.network = "r50"
config.alpha = 1.0                  # weight of the embedding loss (arXiv:2108.03372)
config.beta = 0.01                  # weight of the logit loss; 0 = none, no logits in the queue, any sample_rate
config.queue_size = 8192            # old features that a batch is compared with, the newest ones
config.temperature = 1.0            # T of both softmaxes; inner products are divided by it

# What tools/get_feature/ left behind of the old model on this run's training set.
config.old_embedding = ""           # .npy float32 [num_image, embedding_size], row i = image i of rec
config.old_embedding_label = ""     # .npy int64 [num_image]
config.credible_old_feature = ""    # .npy bool [num_image], by credible_entropy.py: which old features to use; "" = all
config.old_model_path = ""          # the old model's model.pt; not needed, old features come from old_embedding.
                                    # Stated, the run refuses files of old features that are older than it
