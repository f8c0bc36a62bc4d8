"""NCCL: neighborhood consensus contrastive learning for backward-compatible representation (arXiv:2108.03372).

    cd BCT_methods/NCCL/
    torchrun --nproc_per_node=8 train.py configs/OPclass_ms1mv3_r18_to_r50_NCCL_softmax_to_arc_f128.py
"""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))   # the repo root

from BCT_methods.NCCL.loss import NeighborhoodConsensusLoss
from engine.config import ConfigError
from engine.distributed import gather, gather_with_grad
from engine.features import OldFeatures, load_credible
from engine.trainer import Trainer


class NCCL(Trainer):
    """Classify, and keep each image's neighbourhood among the old features, by embeddings and by class logits."""

    def setup(self):
        cfg = self.cfg
        if cfg.sample_rate != 1:
            raise ConfigError(
                f"{cfg.config_file}: sample_rate = {cfg.sample_rate} must be 1: NCCL compares the logits of all classes"
            )
        self.old = OldFeatures(cfg.old_embedding, self.train_set, cfg.old_embedding_label, cfg.embedding_size)
        self.credible = load_credible(cfg.credible_old_feature, self.train_set)
        logit_dtype = torch.float16 if cfg.fp16 and self.device.type == "cuda" else torch.float32
        self.extra["consensus"] = NeighborhoodConsensusLoss(
            cfg.embedding_size, cfg.num_classes, cfg.queue_size, cfg.temperature, logit_dtype
        )

    def losses(self, images, labels, index):
        self.old.check_labels(index, labels)
        new = self.backbone(images)
        old = self.old[index].to(self.device)
        known = torch.where(self.credible[index].to(self.device), labels, -1)

        new_logits = self.classifier.cosines(gather_with_grad(new))
        with torch.no_grad():
            old_logits = self.classifier.cosines(gather(old))
        embedding, logit = self.extra["consensus"](old, old_logits, new, new_logits, known)
        return {
            "cls": self.classifier(new, labels),
            "embedding": self.cfg.alpha * embedding,
            "logit": self.cfg.beta * logit,
        }


if __name__ == "__main__":
    NCCL.main()
