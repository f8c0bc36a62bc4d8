"""New models on the 70 % of the classes that the old model never saw.

Old model: configs/f256_r18_softmax_class30.py.
"""

from easydict import EasyDict as edict

config = edict()

config.embedding_size = 256
config.rec = "dataset/ms1m-retinaface-t1/train_part_70_class.rec"
config.old_model_path = "work_dirs/f256_r18_softmax_class30/model.pt"
config.old_embedding = "feature_save/OPclass/f256_r18_softmax_class70_feature.npy"
config.old_embedding_label = "feature_save/OPclass/f256_r18_softmax_class70_label.npy"
config.old_prototype = "feature_save/OPclass/f256_r18_softmax_class70_avg_feature.npy"
