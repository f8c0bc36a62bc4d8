"""Independent new model, the ceiling: r50, 128 dimensions, ArcFace, all of MS1M-V3. For train_old_arc.py."""

from easydict import EasyDict as edict

config = edict()

config.network = "r50"
config.embedding_size = 128
config.rec = "dataset/ms1m-retinaface-t1"
