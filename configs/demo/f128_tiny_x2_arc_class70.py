"""Demo's independent new model: twice as wide, ArcFace, the same identities as the compatible ones. For train_old_arc.py."""

from easydict import EasyDict as edict

config = edict()

config.network = "tiny_x2"
config.rec = "dataset/ms1m-retinaface-t1/train_part_70_class.rec"
