"""AdvBCT's own keys; configs/base.py and old_model/keys.py explain the others.

The constants are those of MixBCT's comparison; README.md lists the authors' beside them.
"""

from easydict import EasyDict as edict

from old_model.keys import keys

config = edict(keys)

config.network = "r50"
config.threshold = 0.4              # distance between unit vectors, 0 to 2: the far end of every elastic boundary
config.p2s_weight = 4.0             # weight of the point-to-set loss
config.adv_weight = 4.0             # weight of the adversarial loss × (num_epoch + 1 - epoch) / num_epoch, epoch from 0
config.normalize_input = True       # the adversary sees L2-normalised features; False = as the networks give them

config.center_radius = ""           # .npz of the old classes' centres and radii, written at the start if missing;
                                    # "" = <SD>_center_radius.npz beside old_embedding
