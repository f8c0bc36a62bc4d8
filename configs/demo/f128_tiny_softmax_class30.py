"""Demo's old model: softmax, 30 % of the identities. For train_old_softmax.py."""

from easydict import EasyDict as edict

config = edict()

config.rec = "dataset/ms1m-retinaface-t1/train_part_30_class.rec"
