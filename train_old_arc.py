"""Train an old model, or an independent one, with a margin softmax over class shards (PartialFC).

    torchrun --nproc_per_node=8 train_old_arc.py configs/f512_r18_arc_class30.py

Margin: ArcFace (arXiv:1801.07698); classifier: Killing Two Birds with One Stone (arXiv:2203.15565).
"""

from engine.trainer import Trainer


class OldArc(Trainer):
    """Train an old (or an independent new) model with ArcFace and PartialFC."""

    def losses(self, batch):
        return {"cls": self.classifier(self.backbone(batch.images), batch.labels)}


if __name__ == "__main__":
    OldArc.main()
