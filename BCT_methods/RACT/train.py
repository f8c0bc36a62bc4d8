"""RACT: hot-refresh model upgrades with regression-alleviating compatible training (ICLR 2022, arXiv:2201.09724).

cd BCT_methods/RACT/
torchrun --nproc_per_node=8 train.py configs/OPclass_ms1mv3_r18_to_r50_RACT_softmax_to_arc_f128.py
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from BCT_methods.RACT.loss import ract_loss
from core.config import require
from engine.trainer import Trainer


class RACT(Trainer):
    """Classify, and contrast each image's old feature with the hardest old and new features of other people."""

    old_features = "rows"

    def setup(self):
        cfg = self.cfg
        require(cfg, "ract_weight", cfg.ract_weight >= 0, "at least 0")
        require(cfg, "temperature", cfg.temperature > 0, "above 0")
        require(cfg, "negatives", cfg.negatives >= 1, "at least 1")

    def losses(self, batch):
        cfg = self.cfg
        new = self.backbone(batch.images)
        contrast = ract_loss(new, batch.old, batch.labels, cfg.temperature, cfg.negatives, cfg.negative_grad)
        return {"cls": self.classifier(new, batch.labels), "ract": cfg.ract_weight * contrast}


if __name__ == "__main__":
    RACT.main()
