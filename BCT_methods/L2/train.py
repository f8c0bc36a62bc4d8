"""L2: pull each image's new feature to its old one, or with a threshold to within that distance (arXiv:2003.11942).

cd BCT_methods/L2/
torchrun --nproc_per_node=8 train.py configs/OPclass_ms1mv3_r18_to_r50_L2_softmax_to_arc_f128.py
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from BCT_methods.L2.loss import feature_l2_loss
from core.config import require
from engine.trainer import Trainer


class L2(Trainer):
    """Classify, and pull every new feature to its image's old one."""

    old_features = "rows"

    def setup(self):
        cfg = self.cfg
        weights = cfg.loss_weight
        two = len(weights) == 2 and all(isinstance(weight, (int, float)) and weight >= 0 for weight in weights)
        require(cfg, "loss_weight", two, "two numbers, [w0, w1], each at least 0")
        require(cfg, "threshold", 0 <= cfg.threshold <= 2, "in [0, 2]")

    def losses(self, batch):
        cls_weight, l2_weight = self.cfg.loss_weight
        new = self.backbone(batch.images)
        distance = feature_l2_loss(new, batch.old, self.cfg.threshold)
        return {"cls": cls_weight * self.classifier(new, batch.labels), "l2": l2_weight * distance}


if __name__ == "__main__":
    L2.main()
