"""BCT: the old classifier must classify the new features correctly too (CVPR 2020, arXiv:2003.11942).

cd BCT_methods/BCT/
torchrun --nproc_per_node=8 train.py configs/OPclass_ms1mv3_r18_to_r50_BCT_softmax_to_arc_f128.py
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from BCT_methods.BCT.loss import old_prototype_loss
from BCT_methods.BCT.prototypes import load_prototypes
from core.config import require
from core.distributed import global_mean
from engine.trainer import Trainer


class BCT(Trainer):
    """Classify by the new class centres and by the fixed class means of the old features."""

    def setup(self):
        cfg = self.cfg
        require(cfg, "scale", cfg.scale > 0, "above 0")
        prototypes = load_prototypes(cfg.old_prototype, cfg.num_classes, cfg.embedding_size)
        self.prototypes = prototypes.to(self.device)

    def losses(self, batch):
        new = self.backbone(batch.images)
        old_cls = old_prototype_loss(new, batch.labels, self.prototypes, self.cfg.scale)
        return {"cls": self.classifier(new, batch.labels), "old_cls": global_mean(old_cls)}


if __name__ == "__main__":
    BCT.main()
