"""LCE: learning compatible embeddings (ICCV 2021, arXiv:2108.01958).

cd BCT_methods/LCE/
torchrun --nproc_per_node=8 train.py configs/OPclass_ms1mv3_r18_to_r50_LCE_softmax_to_arc_f128.py
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from BCT_methods.LCE.loss import boundary_loss, center_alignment_loss
from BCT_methods.LCE.old_classes import old_classes
from core.config import require
from core.distributed import gather, gather_with_grad, sum_over_ranks
from engine.trainer import Trainer
from losses.sharded import local_labels


class LCE(Trainer):
    """Classify by centres drawn to those of the old classes, and stay within these."""

    old_features = "labels"  # batches need only these; the old classes are read at the start

    def setup(self):
        cfg = self.cfg
        for weight in ("align_weight", "boundary_weight"):
            require(cfg, weight, cfg[weight] >= 0, "at least 0")
        every = f"1 with align_weight = {cfg.align_weight}: it aligns all; set sample_rate = 1 or align_weight = 0"
        require(cfg, "sample_rate", cfg.sample_rate == 1 or cfg.align_weight == 0, every)
        start, count = self.classifier.class_start, self.classifier.num_local
        classes = old_classes(self.old, cfg.num_classes, start, start + count)
        self.old_centers, self.min_cosine = (array.to(self.device) for array in classes)

    def losses(self, batch):
        cfg = self.cfg
        new = self.backbone(batch.images)
        terms = {"cls": self.classifier(new, batch.labels)}
        if cfg.align_weight > 0:
            alignment = center_alignment_loss(self.classifier.weight, self.old_centers[:-1])
            terms["align"] = cfg.align_weight * alignment
        # The global batch against this rank's classes; all others are -1, the last row, outside of which nothing lies.
        own = local_labels(gather(batch.labels), self.classifier.class_start, len(self.old_centers) - 1)
        boundary = boundary_loss(gather_with_grad(new), own, self.old_centers, self.min_cosine)
        return {**terms, "boundary": cfg.boundary_weight * sum_over_ranks(boundary)}


if __name__ == "__main__":
    LCE.main()
