"""What each method adds to a plain ArcFace step, as a share of that step.

    python benchmarks/bench_methods.py                                     # r18, batch 128, 65,402 classes
    python benchmarks/bench_methods.py --num-classes 2000 --batch-size 32 --network tiny --rounds 20
    python benchmarks/bench_methods.py --methods "" --metadata-rows 3600000      # AdvBCT's class metadata alone

A plain step is forward, backward and update of the backbone and the classifier. What a method adds is its own `losses`
on given embeddings, forward and backward, with reading old features, exchanging and updating its own parameters, but
with a backbone and a classifier loss that cost nothing. In each round every part runs once, so that a change of the
machine's speed meets all alike. Old features come from a file that is in memory after the first rounds. UniBCT is
between refinements. On CUDA the parts are timed alone, with the device idle before: an upper bound for the small ones,
whose launches a real step hides. NCCL is the published run, NCCLdefinition has the logit loss as well.
"""

import argparse
import importlib
import pathlib
import statistics
import sys
import tempfile
import time
import types

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))   # the repo root

import numpy as np
import torch

from BCT_methods.AdvBCT.boundary import class_boundaries
from benchmarks.common import machine, old_feature_paths, seconds, write_old_features
from core import distributed
from core.config import REPO, load_config
from engine.trainer import Trainer

# % of a plain step
LIMITS = {"MixBCT": 3, "L2": 3, "BCT": 3, "UniBCT": 3, "AdvBCT": 10, "NCCL": 3, "NCCLdefinition": 25}
VARIANTS = {"NCCLdefinition": ("NCCL", {"alpha": 1.0, "beta": 0.01})}     # a method at other keys than its configs'
EPOCH = 10      # UniBCT's prototype term is on


class Plain(Trainer):
    """ArcFace alone."""

    def losses(self, images, labels, index):
        return {"cls": self.classifier(self.backbone(images), labels)}


class FreeClassifier:
    """Cosines cost what they cost, the classification loss nothing; gradients pass through it to the embeddings."""

    def __init__(self, classifier):
        self.cosines = classifier.cosines

    def __call__(self, embeddings, labels):
        return embeddings.sum()


def make_trainer(kind, config, folder, args, keys):
    """`kind` on the synthetic set; of `keys`, those that the config knows."""
    cfg = load_config(config)
    keys = {
        **keys, "rec": "synthetic", "rec_val": "", "num_classes": args.num_classes, "num_image": 2 * args.num_classes,
        "batch_size": args.batch_size, "embedding_size": args.embedding_size, "network": args.network, "num_workers": 0,
        "output": str(folder / "out"), "clip_grad_norm": 5.0, "num_epoch": 35,
    }
    cfg.update({key: value for key, value in keys.items() if key in cfg})
    return kind(cfg)


def make_extras(folder, args, plain, batch):
    """`{method: function}`, each running once what its method adds to the step of `plain`, on a given batch."""
    keys = {**old_feature_paths(folder), "refine_epochs": [2 * EPOCH], "network": "tiny"}
    write_old_features(keys, plain.train_set.labels(), args.num_classes, args.embedding_size)
    small = argparse.Namespace(**{**vars(args), "network": "tiny"})     # its backbone is thrown away
    embeddings = torch.randn(args.batch_size, args.embedding_size, device=plain.device, requires_grad=True)
    classifier = plain.classifier
    extras = {}
    for name in filter(None, args.methods.split(",")):
        folder_name, own_keys = VARIANTS.get(name, (name, {}))
        kind = getattr(importlib.import_module(f"BCT_methods.{folder_name}.train"), folder_name)
        config = next((REPO / "BCT_methods" / folder_name / "configs").glob(f"*_{folder_name}_*.py"))
        method = make_trainer(kind, config, folder, small, {**keys, **own_keys})
        method.epoch = EPOCH
        method.begin_epoch()
        method.backbone, method.classifier = lambda images: embeddings * 1, FreeClassifier(classifier)
        own = list(method.extra.parameters())
        own = torch.optim.SGD(own, lr=0.1, momentum=0.9) if own else None
        extras[name] = lambda method=method, own=own: run_extra(method, own, batch)
    return extras


def run_extra(method, optimizer, batch):
    sum(method.losses(*batch).values()).backward()
    if optimizer is not None:
        for parameter in method.extra.parameters():
            distributed.all_reduce_(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()


def run_plain(trainer, batch):
    trainer.scaler.scale(sum(trainer.losses(*batch).values())).backward()
    trainer.update()


def bench_steps(folder, args):
    config = folder / "plain.py"
    config.write_text("config = {}\n")
    plain = make_trainer(Plain, config, folder, args, {})
    plain.monitor = types.SimpleNamespace(skipped=0)
    index = torch.randint(plain.cfg.num_image, (args.batch_size,), generator=torch.Generator().manual_seed(0))
    images = torch.rand(args.batch_size, 3, 112, 112, device=plain.device) * 2 - 1
    batch = images, (index % args.num_classes).to(plain.device), index
    parts = {"plain step": lambda: run_plain(plain, batch), **make_extras(folder, args, plain, batch)}

    times = {name: [] for name in parts}
    for number in range(args.warmup + args.rounds):
        for name, part in parts.items():
            # The classifier's gradient is there when a method adds its own to it, as in a real step.
            if name != "plain step" and plain.classifier.weight.grad is None:
                plain.classifier.weight.grad = torch.zeros_like(plain.classifier.weight)
            spent = seconds(part, plain.device)
            if number >= args.warmup:
                times[name].append(spent)
    report(times, plain, args)


def report(times, plain, args):
    steps = times.pop("plain step")
    step = statistics.median(steps)
    print(
        f"{args.network}, batch {args.batch_size}, {args.num_classes:,} classes, embedding {args.embedding_size}, "
        f"{machine(plain.device)}, medians of {args.rounds} rounds"
    )
    print(f"plain ArcFace step   {1e3 * step:10.1f} ms")
    for name, spent in times.items():
        shares = [100 * one / its_step for one, its_step in zip(spent, steps)]     # of the same round
        share = statistics.median(shares)
        verdict = "within" if share <= LIMITS[name] else "OVER"
        print(
            f"{name:14s} adds  {1e3 * statistics.median(spent):10.1f} ms  {share:6.2f} %"
            f"  ({min(shares):.2f} to {max(shares):.2f})   {verdict} {LIMITS[name]} %"
        )


def bench_metadata(folder, args):
    """AdvBCT's centres and radii of so many rows, from a memory-mapped file, labels in random order."""
    random = np.random.default_rng(0)
    rows, width = args.metadata_rows, args.metadata_width
    features = np.lib.format.open_memmap(folder / "metadata.npy", mode="w+", dtype=np.float32, shape=(rows, width))
    for start in range(0, rows, 1 << 16):
        part = features[start:start + (1 << 16)]
        part[:] = random.standard_normal(part.shape, dtype=np.float32)
    features.flush()
    labels = random.integers(args.num_classes, size=rows)
    features = np.load(folder / "metadata.npy", mmap_mode="r")
    start = time.perf_counter()
    class_boundaries(features, labels, args.num_classes)
    spent = time.perf_counter() - start
    print(f"AdvBCT's class metadata: {rows:,} x {width} features, {args.num_classes:,} classes: {spent:.1f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(LIMITS), help="comma-separated; \"\" = none")
    parser.add_argument("--network", default="r18", help="backbone of the plain step")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--num-classes", type=int, default=65402)
    parser.add_argument("--embedding-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the ones that count")
    parser.add_argument("--metadata-rows", type=int, default=0, help="time AdvBCT's class metadata on so many rows")
    parser.add_argument("--metadata-width", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.methods:
            bench_steps(pathlib.Path(folder), args)
        if args.metadata_rows:
            bench_metadata(pathlib.Path(folder), args)


if __name__ == "__main__":
    main()
