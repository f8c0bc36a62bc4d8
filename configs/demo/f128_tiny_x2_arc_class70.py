"""Demo's independent new model: ArcFace, on what the compatible ones train on. For train_old_arc.py."""

from easydict import EasyDict as edict

config = edict()

config.network = "tiny_x2"
config.rec = "dataset/ms1m-retinaface-t1/train_part_70_class.rec"
