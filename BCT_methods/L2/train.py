"""L2: the new feature of each image is drawn to its old one; with a threshold, only to its neighbourhood.

    cd BCT_methods/L2/
    torchrun --nproc_per_node=8 train.py configs/OPclass_ms1mv3_r18_to_r50_L2_softmax_to_arc_f128.py
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))   # the repo root

from BCT_methods.L2.loss import feature_l2_loss
from engine.config import ConfigError
from engine.distributed import global_mean
from engine.features import OldFeatures
from engine.trainer import Trainer


class L2(Trainer):
    """Classify, and keep every new feature near the old one of its image."""

    def setup(self):
        cfg = self.cfg
        if len(cfg.loss_weight) != 2:
            raise ConfigError(f"{cfg.config_file}: loss_weight = {cfg.loss_weight}; it must be two numbers, [w0, w1]")
        if not 0 <= cfg.threshold <= 2:
            raise ConfigError(f"{cfg.config_file}: threshold = {cfg.threshold}; it must be in [0, 2]")
        self.old = OldFeatures(cfg.old_embedding, self.train_set, cfg.old_embedding_label, cfg.embedding_size)

    def losses(self, images, labels, index):
        self.old.check_labels(index, labels)
        cls_weight, l2_weight = self.cfg.loss_weight
        new = self.backbone(images)
        distance = feature_l2_loss(new, self.old[index].to(self.device), self.cfg.threshold)
        return {"cls": cls_weight * self.classifier(new, labels), "l2": l2_weight * global_mean(distance)}


if __name__ == "__main__":
    L2.main()
