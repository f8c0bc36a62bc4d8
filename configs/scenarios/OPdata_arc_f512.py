"""New models on the 70 % of each class's images that the old model never saw.

Old model: configs/f512_r18_arc_data30.py.
"""

from easydict import EasyDict as edict

config = edict()

config.embedding_size = 512
config.rec = "dataset/ms1m-retinaface-t1/train_part_70_data.rec"
config.old_model_path = "work_dirs/f512_r18_arc_data30/model.pt"
config.old_embedding = "feature_save/OPdata/f512_r18_arc_data70_feature.npy"
config.old_embedding_label = "feature_save/OPdata/f512_r18_arc_data70_label.npy"
config.old_prototype = "feature_save/OPdata/f512_r18_arc_data70_avg_feature.npy"
