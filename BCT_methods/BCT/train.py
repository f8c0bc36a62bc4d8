"""BCT: the old classifier must classify the new features correctly too (CVPR 2020, arXiv:2003.11942).

cd BCT_methods/BCT/
torchrun --nproc_per_node=8 train.py configs/OPclass_ms1mv3_r18_to_r50_BCT_softmax_to_arc_f128.py
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from BCT_methods.BCT.prototypes import load_prototypes
from core.config import require
from engine.trainer import Trainer
from losses import OldPrototypes


class BCT(Trainer):
    """Classify by the new class centres and by the fixed class means of the old features."""

    def setup(self):
        cfg = self.cfg
        require(cfg, "scale", cfg.scale > 0, "above 0")
        old = self.extra["old_classifier"] = OldPrototypes(cfg.num_classes, 0, stored=False)  # the file has the width
        old.prototypes = load_prototypes(cfg.old_prototype, cfg.num_classes, old.classes)
        self.log_widths(old.prototypes.shape[1])

    def losses(self, batch):
        new = self.backbone(batch.images)
        old_cls = self.extra["old_classifier"](new, batch.labels, self.cfg.scale)
        return {"cls": self.classifier(new, batch.labels), "old_cls": old_cls}


if __name__ == "__main__":
    BCT.main()
