"""What a training step waits for its old features: read ahead by the thread, read in the step, read by the mapping.

    python benchmarks/bench_old_features.py                           `tiny`, 400,000 x 512 (0.8 GB of disk)
    python benchmarks/bench_old_features.py --rows 3600000 --network r18       7.4 GB, the new part of MS1M-V3

Trains L2, on synthetic images, by the trainer's own steps; three trainers take turns. The figure is the share of the
steps' time that the training thread is in the calls of its old features: labels compared, rows announced, rows fetched.
It is taken with the file in memory and, as in the first epoch, with none of it there: then the system is told before
each step to forget it (Linux). By the mapping is how NumPy reads rows of a memory-mapped array.
"""

import argparse
import itertools
import mmap
import os
import pathlib
import statistics
import sys
import tempfile
import time
import types

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))   # the repo root

import numpy as np
import torch

from BCT_methods.L2.train import L2
from benchmarks.common import machine, old_feature_paths, synchronize, write_old_features
from core.config import REPO, load_config
from engine.extract import to_device

LIMIT = 1   # % of a step, for rows read ahead


class ReadInStep(L2):
    """The loader announces nothing."""

    def open_old_features(self):
        self.loader.read_ahead = lambda reader: None
        return super().open_old_features()


class ReadByMapping(ReadInStep):
    """Rows are taken from the memory-mapped array."""

    def open_old_features(self):
        old = super().open_old_features()
        old.fetch = lambda index, device: to_device(torch.from_numpy(old.features[index.numpy()]), device)
        return old


class Run:
    """One trainer and how long its steps, and in them the calls of its old features, have taken."""

    def __init__(self, kind, cfg):
        self.trainer, self.spent = kind(cfg), 0.0
        self.trainer.monitor = types.SimpleNamespace(update=lambda *_: None, skipped=0)
        for name in ("check_labels", "prefetch", "fetch"):
            setattr(self.trainer.old, name, self._timed(getattr(self.trainer.old, name)))
        self.batches = self._endless()

    def _timed(self, function):
        def call(*args):
            start = time.perf_counter()
            result = function(*args)
            self.spent += time.perf_counter() - start
            return result

        return call

    def _endless(self):
        for epoch in itertools.count():
            self.trainer.loader.set_epoch(epoch)
            yield from self.trainer.loader

    def step(self):
        """`(seconds of the step, seconds of them in the calls of the old features)`."""
        self.spent, start = 0.0, time.perf_counter()
        self.trainer.accumulate(*next(self.batches), last=True)
        self.trainer.update()
        synchronize(self.trainer.device)
        return time.perf_counter() - start, self.spent

    def forget_file(self):
        features = self.trainer.old.features
        features._mmap.madvise(mmap.MADV_DONTNEED)  # else the system would keep what is mapped
        file = os.open(self.trainer.old.path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def make_config(args, folder, name):
    cfg = load_config(REPO / "BCT_methods/L2/configs/OPclass_ms1mv3_r18_to_r50_L2_softmax_to_arc_f128.py")
    cfg.update(old_feature_paths(folder))
    cfg.update(
        rec="synthetic", rec_val="", val_targets=[], num_classes=args.num_classes, num_image=args.rows,
        batch_size=args.batch_size, embedding_size=args.width, network=args.network, num_workers=args.workers,
        output=str(folder / name),
    )
    return cfg


def measure(runs, args, cold):
    """`{name: [(seconds of a step, of the old features), ...]}`."""
    times = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            for _ in range(args.steps):
                if cold:
                    run.forget_file()
                times[name].append(run.step())
        if number == 0:     # workers start, the caches fill; only then are rows read ahead
            times = {name: [] for name in runs}
    return times


def report(times, what):
    for name, steps in times.items():
        step, spent = (statistics.median(column) for column in zip(*steps))
        whole, own = (sum(column) for column in zip(*steps))
        share = 100 * own / whole
        verdict = ("   within" if share <= LIMIT else "   OVER") + f" {LIMIT} %" if name == "read ahead" else ""
        print(
            f"{what:10s} {name:15s} step {1e3 * step:8.1f} ms   old features {1e3 * spent:8.3f} ms, "
            f"at most {1e3 * max(own for _, own in steps):8.3f}   {share:6.2f} % of all steps{verdict}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--num-classes", type=int, default=2000)
    parser.add_argument("--network", default="tiny")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1, help="data workers of a trainer")
    parser.add_argument("--steps", type=int, default=10, help="of one trainer after the other")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="for the file of features, which is removed; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = pathlib.Path(folder)
        labels = np.arange(args.rows) % args.num_classes
        write_old_features(old_feature_paths(folder), labels, args.num_classes, args.width)
        kinds = {"read ahead": L2, "in the step": ReadInStep, "by the mapping": ReadByMapping}
        runs = {name: Run(kind, make_config(args, folder, kind.__name__)) for name, kind in kinds.items()}
        print(f"{args.rows:,} x {args.width} float32, L2, {args.network}, batch {args.batch_size}, "
              f"{args.workers} workers; {machine(next(iter(runs.values())).trainer.device)}")
        report(measure(runs, args, cold=False), "in memory")
        if hasattr(os, "posix_fadvise"):
            report(measure(runs, args, cold=True), "on disk")


if __name__ == "__main__":
    main()
