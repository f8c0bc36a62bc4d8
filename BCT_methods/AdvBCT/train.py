"""AdvBCT: boundary-aware backward-compatible representation via adversarial learning (arXiv:2305.02610).

cd BCT_methods/AdvBCT/
torchrun --nproc_per_node=8 train.py configs/OPclass_ms1mv3_r18_to_r50_AdvBCT_softmax_to_arc_f128.py
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from BCT_methods.AdvBCT.boundary import ElasticBoundary, default_path, load_boundaries, point_to_set_loss
from BCT_methods.AdvBCT.discriminator import Discriminator, adversarial_loss, reversal_strength
from core.config import require
from engine.trainer import Trainer


class AdvBCT(Trainer):
    """Classify, stay within the old classes' boundaries, and look to an adversary like the old model."""

    old_features = "rows"

    def setup(self):
        cfg = self.cfg
        require(cfg, "threshold", 0 < cfg.threshold <= 2, "above 0 and at most 2")
        for weight in ("p2s_weight", "adv_weight"):
            require(cfg, weight, cfg[weight] >= 0, "at least 0")
        path = cfg.center_radius or default_path(cfg.old_embedding)
        self.classes = [array.to(self.device) for array in load_boundaries(path, self.old, cfg.num_classes)]
        self.extra["boundary"] = ElasticBoundary(cfg.num_classes)
        self.extra["discriminator"] = Discriminator(self.old.width)

    def losses(self, batch):
        cfg = self.cfg
        new = self.backbone(batch.images)
        outside = point_to_set_loss(new, batch.labels, *self.classes, self.extra["boundary"], cfg.threshold)
        alpha = reversal_strength(self.step / self.total_steps)
        adversarial = adversarial_loss(self.extra["discriminator"], new, batch.old, alpha, cfg.normalize_input)
        fade = (cfg.num_epoch - self.epoch + 1) / cfg.num_epoch  # epochs from 0: 36/35 ... 2/35, as published
        return {
            "cls": self.classifier(new, batch.labels),
            "p2s": cfg.p2s_weight * outside,
            "adv": cfg.adv_weight * fade * adversarial,
        }


if __name__ == "__main__":
    AdvBCT.main()
