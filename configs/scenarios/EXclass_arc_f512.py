"""New models on all classes, the old model's 30 % among them.

Old model: configs/f512_r18_arc_class30.py.
"""

from easydict import EasyDict as edict

config = edict()

config.embedding_size = 512
config.rec = "dataset/ms1m-retinaface-t1"
config.old_model_path = "work_dirs/f512_r18_arc_class30/model.pt"
config.old_embedding = "feature_save/EXclass/f512_r18_arc_class100_feature.npy"
config.old_embedding_label = "feature_save/EXclass/f512_r18_arc_class100_label.npy"
config.old_prototype = "feature_save/EXclass/f512_r18_arc_class100_avg_feature.npy"
