"""Old model: r18, 512 dimensions, ArcFace, 30 % of the images of each class of MS1M-V3. For train_old_arc.py."""

from easydict import EasyDict as edict

config = edict()

config.network = "r18"
config.embedding_size = 512
config.rec = "dataset/ms1m-retinaface-t1/train_part_30_data.rec"
