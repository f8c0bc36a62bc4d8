"""NCCL's own keys; configs/base.py and old_model/keys.py explain the others.

alpha and beta are those of the written definition; the ms1mv3 and demo configs set the published run's, 8 and 0.
"""

from easydict import EasyDict as edict

from old_model.keys import keys

config = edict(keys)

config.network = "r50"
config.alpha = 1.0                  # weight of the embedding loss (arXiv:2108.03372)
config.beta = 0.01                  # weight of the logit loss; 0 = none, no logits in the queue, any sample_rate
config.queue_size = 8192            # number of newest old features that a batch is compared with
config.temperature = 1.0            # T of both softmaxes; divides the inner products
config.credible_old_feature = ""    # .npy bool [num_image], by credible_entropy.py: which old features to use; "" = all
