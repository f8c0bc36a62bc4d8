"""MixBCT: towards self-adapting backward-compatible training (arXiv:2308.06948).

    cd BCT_methods/MixBCT/
    torchrun --nproc_per_node=8 train.py configs/OPclass_ms1mv3_r18_to_r50_MixBCT_softmax_to_arc_f128.py
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))   # the repo root

from BCT_methods.MixBCT.mix import mix_old_features
from engine.config import require
from engine.old_features import load_credible
from engine.trainer import Trainer


class MixBCT(Trainer):
    """Classify a batch in which some new features are replaced by old, credible ones."""

    def setup(self):
        cfg = self.cfg
        require(cfg, "mix_ratio", 0 <= cfg.mix_ratio <= 1, "in [0, 1]")
        self.old = self.open_old_features()
        self.credible = load_credible(cfg.credible_old_feature, self.train_set, cfg.old_model_path)

    def losses(self, images, labels, index):
        self.old.check_labels(index, labels)
        old = self.old[index]
        new = self.backbone(images)
        mixed = mix_old_features(new, old, self.credible[index], self.cfg.mix_ratio, self.generator)
        return {"cls": self.classifier(mixed, labels)}


if __name__ == "__main__":
    MixBCT.main()
