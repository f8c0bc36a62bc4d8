"""Demo's independent new model: twice as wide, ArcFace, all identities. For train_old_arc.py."""

from easydict import EasyDict as edict

config = edict()

config.network = "tiny_x2"
config.rec = "dataset/ms1m-retinaface-t1"
config.warmup_epoch = 5.0
