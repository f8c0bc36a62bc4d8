"""UniBCT: BCT whose prototypes are refined by the structure of the new features (IJCAI 2022, arXiv:2203.01583).

cd BCT_methods/UniBCT/
torchrun --nproc_per_node=8 train.py configs/OPclass_ms1mv3_r18_to_r50_UniBCT_softmax_to_arc_f128.py
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from BCT_methods.UniBCT.refinement import Refinement, check_config
from engine.build import unwrap
from engine.trainer import Trainer


class UniBCT(Trainer):
    """Classify by the new class centres and, from `compat_start_epoch` on, by refined means of the old features."""

    old_features = "labels"  # batches need only these; the refinement reads all rows itself
    same_run = ("normalize_prototypes",)  # a checkpoint's prototypes stay in use until the next refinement

    def setup(self):
        check_config(self.cfg)
        self.extra["refinement"] = Refinement(self.old, self.cfg, self.device)

    def resume(self):
        resumed = super().resume()
        if self.step > self.epoch * self.steps_per_epoch:  # this epoch began, perhaps with another compat_start_epoch
            self.ensure_prototypes()
        return resumed

    def begin_epoch(self):
        if self.epoch in self.cfg.refine_epochs:
            self.extra["refinement"].refine(unwrap(self.backbone), self.train_set, self.epoch)
        else:
            self.ensure_prototypes()

    def ensure_prototypes(self):
        refinement = self.extra["refinement"]
        if self.epoch >= self.cfg.compat_start_epoch and not refinement.is_set():
            refinement.take_class_means(self.epoch)

    def losses(self, batch):
        new = self.backbone(batch.images)
        terms = {"cls": self.classifier(new, batch.labels)}
        if self.epoch >= self.cfg.compat_start_epoch:
            terms["old_cls"] = self.extra["refinement"](new, batch.labels, self.cfg.scale)
        return terms


if __name__ == "__main__":
    UniBCT.main()
