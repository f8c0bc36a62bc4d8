"""AdvBCT's own keys. They are over configs/base.py, which explains the others.

The constants are those of MixBCT's comparison; README.md has the authors' beside them.
"""

from easydict import EasyDict as edict

config = edict()

config.network = "r50"
config.threshold = 0.4              # distance between unit vectors, 0 to 2: the far end of every elastic boundary
config.p2s_weight = 4.0             # of the point-to-set loss
config.adv_weight = 4.0             # of the adversarial loss, times (num_epoch + 1 - epoch) / num_epoch, epoch from 0
config.normalize_input = True       # the adversary sees L2-normalised features; False = as the networks give them

# What tools/get_feature/ left behind of the old model on this run's training set.
config.old_embedding = ""           # .npy float32 [num_image, embedding_size], row i = image i of rec
config.old_embedding_label = ""     # .npy int64 [num_image]
config.center_radius = ""           # .npz of the old classes' centres and radii, written at the start where it is
                                    # missing; "" = <SD>_center_radius.npz beside old_embedding
config.old_model_path = ""          # the old model's model.pt; not needed, old features come from old_embedding.
                                    # Stated, the run refuses files of old features that are older than it
