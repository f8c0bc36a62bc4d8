"""NCCL: neighborhood consensus contrastive learning for backward-compatible representation (arXiv:2108.03372).

cd BCT_methods/NCCL/
torchrun --nproc_per_node=8 train.py configs/OPclass_ms1mv3_r18_to_r50_NCCL_softmax_to_arc_f128.py
"""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from BCT_methods.NCCL.loss import NeighborhoodConsensusLoss
from core.config import require
from core.distributed import gather, gather_with_grad, to_device
from core.errors import warn
from engine.trainer import Trainer
from losses import with_width


class NCCL(Trainer):
    """Classify, and preserve each image's neighbourhood among the old features, in embeddings and class logits."""

    old_features = "rows"

    def setup(self):
        cfg = self.cfg
        every_class = f"1 with beta = {cfg.beta}: the logit loss needs all classes; set sample_rate = 1 or beta = 0"
        require(cfg, "sample_rate", cfg.sample_rate == 1 or cfg.beta == 0, every_class)
        require(cfg, "queue_size", cfg.queue_size >= 1, "at least 1")
        batch = cfg.batch_size * self.world_size
        if cfg.queue_size < batch:
            warn("queue_size = %d is less than a step's %d images: only the last of them count", cfg.queue_size, batch)
        require(cfg, "temperature", cfg.temperature > 0, "above 0")
        for weight in ("alpha", "beta"):
            require(cfg, weight, cfg[weight] >= 0, "at least 0")
        half = cfg.fp16 and self.device.type == "cuda"
        logit_dtype = torch.get_autocast_dtype("cuda") if half else torch.float32
        self.extra["consensus"] = NeighborhoodConsensusLoss(
            *(self.old.width, cfg.num_classes, cfg.queue_size, cfg.temperature),
            logit_dtype=logit_dtype if cfg.beta > 0 else None,
        )

    def losses(self, batch):
        old, labels = batch.old, batch.labels
        known = torch.where(to_device(batch.credible, self.device), labels, -1)

        new = self.backbone(batch.images)
        old_logits, new_logits = self.logits(old, new) if self.cfg.beta > 0 else (None, None)
        embedding, logit = self.extra["consensus"](old, old_logits, new, new_logits, known)
        terms = {"cls": self.classifier(new, labels), "embedding": self.cfg.alpha * embedding}
        return terms if logit is None else {**terms, "logit": self.cfg.beta * logit}

    def logits(self, old, new):
        """Cosines of the global batch's old and new features to this rank's class centres; gradient to the new only.

        The narrower of old features and centres counts as padded with zeros.
        """
        new_logits = self.classifier.cosines(gather_with_grad(new))
        with torch.no_grad():
            old, width = gather(old), new.shape[1]
            old_logits = self.classifier.cosines(with_width(old, width))
            if old.shape[1] > width:  # the part that meets the centres is shorter than the feature
                part, whole = (torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in (old[:, :width], old))
                old_logits = old_logits * (part / whole.clamp(min=1e-12))
            return old_logits, new_logits


if __name__ == "__main__":
    NCCL.main()
