"""How fast a config trains, and what the code around its model costs: ratio = run / bare step, in images/s.

    python benchmarks/bench_train.py configs/f512_r50_arc_data100.py                     # its own data
    python benchmarks/bench_train.py configs/f512_r50_arc_data100.py --rec synthetic     # random images, no decoding
    python benchmarks/bench_train.py configs/f512_r50_arc_data100.py --draw 512          # JPEGs drawn here, to decode
    python benchmarks/bench_train.py BCT_methods/L2/configs/OPclass_...py --draw 512 --fake-old
    torchrun --nproc_per_node=8 benchmarks/bench_train.py configs/f512_r50_arc_data100.py --rec synthetic

Any config key can be overridden as in training: --batch_size 32 --num_workers 8. The run is the Trainer's own
`train()`, timed in rounds from within its loader. Between rounds, with the data workers stopped, as many bare steps are
timed: the method's losses, backward and update on one reused batch. UniBCT is between refinements.
--draw and --fake-old write to the temporary directory (TMPDIR), which the ranks must share. `--clock processor` counts
this process's CPU time, for a shared machine; set OMP_NUM_THREADS=1 with it, since waiting threads count.
"""

import argparse
import contextlib
import importlib
import mmap
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the repo root

import torch

from benchmarks import common
from benchmarks.common import median, old_feature_paths
from core import distributed
from core.config import ConfigError, load_config
from core.errors import report_errors
from dataset import open_train_set

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
SETTINGS = ("network", "num_classes", "embedding_size", "batch_size", "gradient_acc", "num_workers", "fp16", "rec")


def trainer_class(config):
    """The Trainer of the config's folder in BCT_methods, else train_old_softmax's or train_old_arc's, by its name."""
    parts = pathlib.Path(config).resolve().parts
    if "BCT_methods" in parts:
        name = f"BCT_methods.{parts[parts.index('BCT_methods') + 1]}.train"
    else:
        name = "train_old_softmax" if "_softmax_" in parts[-1] else "train_old_arc"
    kinds = vars(importlib.import_module(name)).values()
    return next(kind for kind in kinds if isinstance(kind, type) and kind.__module__ == name)


def make_config(args, overrides, folder):
    """The run's config, without saving or verification; drawn and synthetic sets default to MS1M-V3's classes."""
    ours = {"output": f"{folder}/out", "save_all_states": False, "compat_start_epoch": 0, "refine_epochs": []}
    if args.draw:
        ours["rec"] = f"{folder}/train.rec"
    if args.fake_old:
        ours |= {"scenario": "", **old_feature_paths(folder)}
    known = load_config(args.config)
    cfg = load_config(args.config, [*(f"--{key}={value}" for key, value in ours.items() if key in known), *overrides])
    if args.draw or cfg.rec == "synthetic":
        images = (args.warmup + args.rounds * args.steps + 1) * cfg.batch_size * cfg.gradient_acc
        cfg.num_classes = cfg.num_classes or 93_431
        cfg.num_image = cfg.num_image or max(images * distributed.world_size(), cfg.num_classes)
    if distributed.is_main() and args.draw:
        common.draw_record_set(cfg.rec, args.draw, cfg.num_image, cfg.num_classes)
    if distributed.is_main() and args.fake_old:
        data = open_train_set(cfg.rec, cfg.num_classes, cfg.num_image)
        common.write_old_features(old_feature_paths(folder), data.labels(), data.num_classes, cfg.embedding_size)
    distributed.barrier()
    return cfg


def forget(old):
    """Evict the file of old features from the page cache (Linux)."""
    old.features.array._mmap.madvise(mmap.MADV_DONTNEED)  # mapped pages are not evicted
    with open(old.path, "rb") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Done(Exception):
    """Ends the run after the last round."""


class TimedLoader:
    """Wraps the trainer's loader and times rounds of the run and, between them, of bare steps.

    `run`, `bare`, `wait`: seconds per step of each round; `wait` is the time in the loader's `next`.
    """

    def __init__(self, trainer, args):
        self.trainer, self.args, self.loader, self.clock = trainer, args, trainer.loader, CLOCKS[args.clock]
        self.run, self.bare, self.wait = [], [], []
        trainer.loader = self

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __iter__(self):
        args, acc = self.args, self.trainer.cfg.gradient_acc
        batches, batch, number, waited, start = iter(self.loader), None, 0, 0.0, 0.0
        while True:
            rounds, rest = divmod(number - args.warmup * acc, args.steps * acc)
            if number and rounds >= 0 and rest == 0:
                common.synchronize(self.trainer.device)
                if rounds:
                    self.run.append((self.clock() - start) / args.steps)
                    self.wait.append(waited / args.steps)
                self.time_bare_steps(batch)
                if rounds == args.rounds:
                    raise Done
                distributed.barrier()
                waited, start = 0.0, self.clock()
            if args.cold:
                before = self.clock()
                forget(self.trainer.old)
                start += self.clock() - before
            before = self.clock()
            batch = next(batches)
            waited, number = waited + self.clock() - before, number + 1
            yield batch

    def time_bare_steps(self, batch):
        """Time as many bare steps as a round has, without log; the run's schedule is restored afterwards.

        The data workers are stopped, so that they neither prefetch nor compete for the CPU.
        """
        trainer, acc, workers = self.trainer, self.trainer.cfg.gradient_acc, multiprocessing.active_children()

        def steps():
            for _ in range(self.args.steps):
                for micro in range(acc):
                    trainer.accumulate(batch, last=micro == acc - 1)
                trainer.update()

        kept = trainer.monitor, trainer.schedule, trainer.step
        trainer.monitor = trainer.schedule = argparse.Namespace(update=lambda *_: None, step=lambda: None)
        try:
            for worker in workers:
                os.kill(worker.pid, signal.SIGSTOP)
            self.bare.append(common.seconds(steps, trainer.device, self.clock) / self.args.steps)
        finally:
            for worker in workers:
                os.kill(worker.pid, signal.SIGCONT)
        trainer.monitor, trainer.schedule, trainer.step = kept


def measure(args, overrides):
    distributed.init_distributed()
    folder = [tempfile.mkdtemp(prefix="bench_train_") if distributed.is_main() else None]
    if distributed.world_size() > 1:
        torch.distributed.broadcast_object_list(folder)
    try:
        cfg = make_config(args, overrides, folder[0])
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # the log
            trainer = trainer_class(args.config)(cfg)
            if trainer.steps_per_epoch <= args.warmup + args.rounds * args.steps:
                raise ConfigError(
                    f"{cfg.rec}: an epoch of {trainer.steps_per_epoch} steps is too short for these rounds; "
                    "lower --steps or --batch_size, or do not set num_image"
                )
            timed = TimedLoader(trainer, args)
            with contextlib.suppress(Done):
                trainer.train()
        distributed.barrier()  # a slower rank may still need its files
    finally:
        if distributed.is_main():
            shutil.rmtree(folder[0], ignore_errors=True)
    if distributed.is_main():
        report(trainer, timed, args)


def report(trainer, timed, args):
    print(
        f"{type(trainer).__name__}: {', '.join(f'{key} {trainer.cfg[key]}' for key in SETTINGS)}, "
        f"{trainer.world_size} ranks; {common.machine(trainer.device)}"
    )
    print(f"run        {median([trainer.global_batch / one for one in timed.run], '.1f')} images/s, {args.clock} clock")
    print(f"data wait  {median([wait / run for wait, run in zip(timed.wait, timed.run)], '.2%')} of the run's time")
    held = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
    if trainer.device.type == "cuda":
        held += f", GPU {torch.cuda.max_memory_reserved() / 2**20:.0f} MiB"
    print(f"memory     {held} at most in this process")
    # Each round is compared with the mean of the bare steps just before and after it.
    bare = [(before + after) / 2 for before, after in zip(timed.bare, timed.bare[1:])]
    common.print_ratio("speed of the run / bare step", bare, timed.run)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="config file; it comes first")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps per round (default: 20)")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the first round (default: 10)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--draw", type=int, default=0, metavar="N", help="use a temporary record set of N drawn images")
    parser.add_argument("--fake-old", action="store_true", help="use random old features in a temporary file")
    parser.add_argument("--cold", action="store_true", help="evict old features from memory, as in the first epoch")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall or CPU time (default: wall)")
    args, overrides = parser.parse_known_args()
    with report_errors():
        measure(args, overrides)


if __name__ == "__main__":
    main()
    distributed.shutdown()
