"""Config keys of a method that uses old features, declared once. Its `configs/base.py` starts with:

    from old_model.keys import keys
    config = edict(keys)

The files come from tools/get_feature/, run on the run's own training set; a scenario sets them.
"""

from easydict import EasyDict as edict

keys = edict()

keys.old_embedding = ""             # .npy float32 [num_image, d_old], row i = image i of rec; any width
keys.old_embedding_label = ""       # .npy int64 [num_image]; "" = the …_label.npy beside old_embedding
keys.old_model_path = ""            # the old model's model.pt; if it is there, the files must be made from it
