"""Train an old model with a plain softmax head, as production models had before margins.

    torchrun --nproc_per_node=8 train_old_softmax.py configs/f128_r18_softmax_class30.py

The head (`cls_fc`, linear with bias) trains as part of the network, but is in a file of its own, softmax_fc.pt, so that
model.pt loads strictly into a network without head.
"""

import pathlib

import backbones
from core.state_file import save_atomically
from engine.trainer import Trainer
from losses import Softmax

HEAD = "cls_fc."  # the head's keys in backbones.common.SoftmaxHead


class OldSoftmax(Trainer):
    """Train an old model with a linear softmax head."""

    def build_backbone(self):
        cfg = self.cfg
        return backbones.get_model(cfg.network, cfg.embedding_size, cfg.dropout, cfg.fp16, num_classes=cfg.num_classes)

    def build_classifier(self):
        return Softmax()

    def losses(self, batch):
        return {"cls": self.classifier(self.backbone(batch.images), batch.labels)}

    def network_state(self):
        return {key: value for key, value in super().network_state().items() if not key.startswith(HEAD)}

    def save_models(self):
        super().save_models()
        if self.rank == 0:
            whole = super().network_state()
            head = {key.removeprefix(HEAD): value for key, value in whole.items() if key.startswith(HEAD)}
            save_atomically(head, pathlib.Path(self.cfg.output) / "softmax_fc.pt")


if __name__ == "__main__":
    OldSoftmax.main()
