"""The cost that each method adds to a plain ArcFace step, as a share of that step.

    python benchmarks/bench_methods.py                                     # r18, batch 128, 65,402 classes
    python benchmarks/bench_methods.py --num-classes 2000 --batch-size 32 --network tiny --rounds 20

A plain step is forward, backward and update of backbone and classifier. A method's part is its own `losses` on given
embeddings, forward and backward, reading old features and updating its own parameters, with a free backbone and
classification loss. The parts alternate. The file of old features is in memory after the first rounds. UniBCT is
between refinements. On CUDA each part is timed separately on an idle device: an upper bound for small parts, whose
launches a real step hides. NCCL is the published run, NCCLdefinition has the logit loss too.
"""

import importlib
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the repo root

import torch

from benchmarks.common import in_turns, machine, median, old_feature_paths, options, print_ratio, write_old_features
from core import distributed
from core.config import REPO, load_config
from core.distributed import to_device
from engine.loader import Batch
from train_old_arc import OldArc

METHODS = "MixBCT,L2,BCT,UniBCT,AdvBCT,NCCL,NCCLdefinition,RACT,LCE"
VARIANTS = {"NCCLdefinition": ("NCCL", {"alpha": 1.0, "beta": 0.01})}  # a method with keys other than its configs'
EPOCH = 10  # UniBCT's prototype term is on


class FreeClassifier:
    """Real centres and cosines, but a free classification loss that passes gradients to the embeddings."""

    def __init__(self, classifier):
        self.cosines, self.weight, self.class_start = classifier.cosines, classifier.weight, classifier.class_start

    def __call__(self, embeddings, labels):
        return embeddings.sum()


def make_trainer(kind, config, keys):
    cfg = load_config(config)
    cfg.update({key: value for key, value in keys.items() if key in cfg})
    return kind(cfg)


def make_extra(name, keys, plain, embeddings, batch):
    """A function that runs the method's part, added to a step of `plain`, on a given batch."""
    folder, own_keys = VARIANTS.get(name, (name, {}))
    kind = getattr(importlib.import_module(f"BCT_methods.{folder}.train"), folder)
    config = next((REPO / "BCT_methods" / folder / "configs").glob(f"*_{folder}_*.py"))
    method = make_trainer(kind, config, {**keys, **own_keys, "network": "tiny"})  # its backbone is thrown away
    method.epoch = EPOCH
    method.begin_epoch()
    method.backbone, method.classifier = lambda images: embeddings * 1, FreeClassifier(plain.classifier)
    own = list(method.extra.parameters())
    optimizer = torch.optim.SGD(own, lr=0.1, momentum=0.9) if own else None

    def run():
        carried = batch
        if method.old_features == "rows":  # read by a worker in training, but timed here
            rows, old = batch.index.numpy(), method.old
            features = to_device(torch.from_numpy(old.read(rows)), method.device)
            carried = batch._replace(old=features, credible=torch.from_numpy(old.read_credible(rows)))
        sum(method.losses(carried).values()).backward()
        if optimizer is not None:
            for parameter in own:
                distributed.all_reduce_(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()

    return run


def main():
    args = options(
        __doc__, methods=METHODS, network="r18", batch_size=128, num_classes=65402, embedding_size=512, rounds=5
    )
    with tempfile.TemporaryDirectory() as folder:
        keys = {
            **old_feature_paths(folder),
            "rec": "synthetic",
            "rec_val": "",
            "num_image": 2 * args.num_classes,
            "num_workers": 0,
            "output": folder,
            "clip_grad_norm": 5.0,
            "num_epoch": 35,
            "refine_epochs": [2 * EPOCH],
            "num_classes": args.num_classes,
            "batch_size": args.batch_size,
            "network": args.network,
            "embedding_size": args.embedding_size,
        }
        plain = make_trainer(OldArc, "configs/f512_r50_arc_data100.py", keys)
        write_old_features(keys, plain.train_set.labels(), args.num_classes, args.embedding_size)
        index = torch.randint(plain.cfg.num_image, (args.batch_size,), generator=torch.Generator().manual_seed(0))
        images = torch.rand(args.batch_size, 3, 112, 112, device=plain.device) * 2 - 1
        batch = Batch(images, (index % args.num_classes).to(plain.device), index)
        embeddings = torch.randn(args.batch_size, args.embedding_size, device=plain.device, requires_grad=True)

        def plain_step():
            plain.scaler.scale(sum(plain.losses(batch).values())).backward()
            plain.update()
            # As in a real step, a method adds its gradient to an existing one.
            plain.classifier.weight.grad = torch.zeros_like(plain.classifier.weight)

        extras = {name: make_extra(name, keys, plain, embeddings, batch) for name in args.methods.split(",")}
        times = in_turns({"plain step": plain_step, **extras}, args.rounds, plain.device)
        print(
            f"{args.network}, batch {args.batch_size}, {args.num_classes:,} classes, "
            f"embedding {args.embedding_size}, {machine(plain.device)}"
        )
        for name, spent in times.items():
            print(f"{name:10s} {median([1000 * one for one in spent], '10.1f')} ms")
        for name in extras:
            print_ratio(f"{name} / plain step", times[name], times["plain step"], ".2%")


if __name__ == "__main__":
    main()
