"""Train an old model with a plain softmax head, as production models had before margins.

    torchrun --nproc_per_node=8 train_old_softmax.py configs/f128_r18_softmax_class30.py

The head (`cls_fc`, linear with bias) is part of the network and so of model.pt; `load_backbone` drops its keys.
"""

import backbones
from engine.trainer import Trainer
from losses import Softmax


class OldSoftmax(Trainer):
    """Train an old model with a linear softmax head."""

    def build_backbone(self):
        cfg = self.cfg
        return backbones.get_model(cfg.network, cfg.embedding_size, cfg.dropout, cfg.fp16, num_classes=cfg.num_classes)

    def build_classifier(self):
        return Softmax()

    def losses(self, batch):
        return {"cls": self.classifier(self.backbone(batch.images), batch.labels)}


if __name__ == "__main__":
    OldSoftmax.main()
