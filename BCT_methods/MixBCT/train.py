"""MixBCT: towards self-adapting backward-compatible training (arXiv:2308.06948).

cd BCT_methods/MixBCT/
torchrun --nproc_per_node=8 train.py configs/OPclass_ms1mv3_r18_to_r50_MixBCT_softmax_to_arc_f128.py
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from BCT_methods.MixBCT.mix import mix_old_features
from core.config import require
from core.errors import warn
from engine.trainer import Trainer


class MixBCT(Trainer):
    """Classify a batch in which some new features are replaced by old, credible ones."""

    old_features = "rows"

    def build_classifier(self):
        return super().build_classifier(max(self.cfg.embedding_size, self.old.width))

    def setup(self):
        ratio, batch = self.cfg.mix_ratio, self.cfg.batch_size
        require(self.cfg, "mix_ratio", 0 <= ratio <= 1, "in [0, 1]")
        if int(batch * ratio) == 0:
            warn("mix_ratio = %g of batch_size = %d is less than one image: no old feature is mixed in", ratio, batch)

    def losses(self, batch):
        new = self.backbone(batch.images)
        mixed = mix_old_features(new, batch.old, batch.credible, self.cfg.mix_ratio, self.generator)
        return {"cls": self.classifier(mixed, batch.labels)}


if __name__ == "__main__":
    MixBCT.main()
