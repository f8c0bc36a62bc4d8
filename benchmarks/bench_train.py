"""How fast a config trains, and what everything around its model costs, on synthetic and on real records.

    python benchmarks/bench_train.py configs/f512_r50_arc_data100.py                     # its own data
    python benchmarks/bench_train.py configs/f512_r50_arc_data100.py --rec synthetic     # random images, no decoding
    python benchmarks/bench_train.py configs/f512_r50_arc_data100.py --draw 512          # JPEGs drawn here, to decode
    python benchmarks/bench_train.py configs/f512_r50_arc_data100.py --draw 512 --method MixBCT --fake-old
    python benchmarks/bench_train.py configs/f512_r50_arc_data100.py --draw 512 --compare amp_dtype=float16,bfloat16
    torchrun --nproc_per_node=8 benchmarks/bench_train.py configs/f512_r50_arc_data100.py

Any key of the config can be overridden as in training: --batch_size 32 --num_workers 8.

The run is the Trainer's own `train()`, with its loader, log, TensorBoard, old features, clipping and schedule. From
within its loader its steps are timed in rounds; between them, in the same process and with the workers halted, the same
number of steps is timed of loops that do less:

    same losses     the method's own losses, backward and optimiser on one batch of the run (left out for ArcFace and
                    softmax, whose losses are the minimal loop's)
    minimal loop    the same backbone, classifier and optimiser on random tensors that lie on the device
    backbone alone  forward, backward and optimiser of the backbone with a given gradient

Memory is that of the run alone, but the loops need room beside it for a second backbone, classifier and optimiser.
--draw writes at least as many records as there are classes, 7 KB each, and --fake-old a row of features for each, to
the temporary directory (TMPDIR). Several machines need an `--output` that they share.

A step of the run that takes 5 % longer than one of the minimal loop has a ratio of 0.95. docs/benchmarks.md explains
each figure. With `--compare KEY=VALUE,VALUE` each value gets a process of its own (precision is a setting of the whole
process, and one that crashes takes none with it), and their rounds take turns.

`--clock processor` counts the processor's time of this process instead of the clock on the wall, without its workers:
for a CPU that others use at the same time, with OMP_NUM_THREADS=1, since threads that wait for each other count, too.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))   # the repo root

import torch

from benchmarks.common import draw_record_set, forget_peak, machine, old_feature_paths, write_old_features
from benchmarks.flops import MeasuredPeak, StatedPeak, classifier_flops, training_flops
from benchmarks.rounds import Rounds, steps_needed
from dataset import open_train_set
from core import distributed
from core.config import REPO, ConfigError, load_config
from core.errors import report_errors
from engine.trainer import Trainer
from losses import PartialFC

MS1MV3_CLASSES = 93431
PLAIN = ("arc", "softmax")      # methods of the root's train_old_*.py
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
SETTINGS = ("network", "embedding_size", "num_classes", "batch_size", "gradient_acc", "optimizer", "sample_rate")
SETTINGS += ("num_workers", "fp16", "amp_dtype", "tf32", "channels_last", "compile", "sync_bn", "rec")


# --- What is measured ------------------------------------------------------------------------------------------------


def method_of(config):
    """The method that a config file belongs to by its place: a directory of BCT_methods, "softmax" or "arc"."""
    path = pathlib.Path(config)
    parts = path.resolve().parts
    if "BCT_methods" in parts[:-1]:
        return parts[parts.index("BCT_methods") + 1]
    return "softmax" if "_softmax_" in path.stem else "arc"


def trainer_class(method):
    name = f"train_old_{method}" if method in PLAIN else f"BCT_methods.{method}.train"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            known = ", ".join([*PLAIN, *sorted(path.parent.name for path in REPO.glob("BCT_methods/*/train.py"))])
            raise ConfigError(f"--method {method}: there is none of that name; known are {known}") from None
        raise
    own = (kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == name)
    return next(kind for kind in own if issubclass(kind, Trainer))


def config_for(config, method, folder):
    """The config file; for a method that it was not written for, a copy of it in `folder` over that method's keys."""
    path = next((path for path in (pathlib.Path(config), REPO / config) if path.is_file()), pathlib.Path(config))
    if method in (None, method_of(path)) or not path.is_file():
        return path
    parts = path.resolve().parts
    below = parts[len(parts) - parts[::-1].index("configs"):] if "configs" in parts else parts[-1:]
    configs = folder / method / "configs"
    copy = configs.joinpath(*below)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, copy)
    if method not in PLAIN:
        shutil.copy(REPO / "BCT_methods" / method / "configs" / "base.py", configs)
    return copy


def make_config(args, overrides, folder):
    """What the run's config comes to: the file's, with nothing saved or verified, then the command line's.

    UniBCT is measured between refinements, with its prototype term. Drawn and synthetic sets get the classes of
    MS1M-V3 and as many images as the rounds take, where nothing else is said.
    """
    path = config_for(args.config, args.method, folder)
    known = load_config(path)
    ours = {"output": str(folder / "out"), "val_targets": [], "save_all_states": False, "resume": False}
    ours |= {"checkpoint_steps": 0, "compat_start_epoch": 0, "refine_epochs": []}
    cfg = load_config(path, [*(f"--{key}={value}" for key, value in ours.items() if key in known), *overrides])
    if args.draw:
        cfg.rec = str(folder / "train.rec")
    if args.draw or cfg.rec == "synthetic":
        needed = steps_needed(args) * cfg.batch_size * cfg.gradient_acc * distributed.world_size()
        cfg.num_classes = cfg.num_classes or MS1MV3_CLASSES
        cfg.num_image = cfg.num_image or max(needed, cfg.num_classes)
    return cfg


def write_data(args, cfg, folder):
    """The drawn images and the old features that the command line asks for; their paths go into `cfg`."""
    if args.draw and is_local_main():
        draw_record_set(cfg.rec, args.draw, cfg.num_image, cfg.num_classes)
    distributed.barrier()
    if args.fake_old:
        train_set = open_train_set(cfg.rec, cfg.num_classes, cfg.num_image)
        paths = old_feature_paths(folder)
        if is_local_main():
            write_old_features(paths, train_set.labels(), train_set.num_classes, cfg.embedding_size)
        distributed.barrier()
        cfg.update({key: value for key, value in paths.items() if key in cfg})


def is_local_main():
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


@contextlib.contextmanager
def workspace():
    """A temporary directory of the same name on every rank, removed at the end."""
    names = [tempfile.mkdtemp(prefix="bench_train_") if distributed.is_main() else None]
    if distributed.world_size() > 1:
        torch.distributed.broadcast_object_list(names)
    folder = pathlib.Path(names[0])
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        if is_local_main():
            shutil.rmtree(folder, ignore_errors=True)


# --- Figures ---------------------------------------------------------------------------------------------------------


def spread(values):
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def step_flops(trainer):
    """Operations of one of the run's steps on one rank, and what they are made of."""
    cfg, classifier = trainer.cfg, trainer.classifier
    forward, whole = training_flops(trainer.build_backbone)
    flops = {"forward_per_image": forward, "per_image": whole, "classifier_per_step": 0}
    if isinstance(classifier, PartialFC):
        classes = classifier.num_sample if cfg.sample_rate < 1 else classifier.num_local
        batch = cfg.batch_size * trainer.world_size
        flops["classifier_per_step"] = classifier_flops(batch, cfg.embedding_size, classes) * cfg.gradient_acc
    flops["per_step"] = whole * cfg.batch_size * cfg.gradient_acc + flops["classifier_per_step"]
    return flops


def of_all_ranks(value):
    """`value` of every rank, in a list."""
    values = [value] * distributed.world_size()
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def figures(rounds, method, data):
    """All that was measured, as plain values. Of memory and waiting the rank counts that has most of it."""
    trainer, records, flops = rounds.trainer, rounds.records, step_flops(rounds.trainer)
    waits = zip(*of_all_ranks([record["wait"] for record in records]))
    memory = of_all_ranks(rounds.memory)
    return {
        "method": method,
        "settings": {key: trainer.cfg[key] for key in SETTINGS} | {"ranks": trainer.world_size, "data": data},
        "device": trainer.device.type,
        "machine": machine(trainer.device),
        "rounds": records,
        "steps": rounds.args.steps,
        "clock": rounds.args.clock,
        "warmup_seconds": rounds.warmup_seconds,
        "images_per_second": {
            name: spread([trainer.global_batch / record[name] for record in records])
            for name in ("run", *rounds.loops)
        },
        "ratio": {name: spread([record[name] / record["run"] for record in records]) for name in rounds.loops},
        "ratio_of_best": {
            name: min(record[name] for record in records) / min(record["run"] for record in records)
            for name in rounds.loops
        },
        "wait_share": spread([max(shares) for shares in waits]),
        "memory": {name: max(its[name] for its in memory) for name in rounds.memory},
        "flops": flops,
        "peak_flops": spread([record["peak"] for record in records]) | {"by": str(rounds.peak)},
        "mfu": spread([flops["per_step"] / record["run"] / record["peak"] for record in records]),
    }


def report(found):
    """The figures as text."""
    s, rounds, flops, peak = (found[key] for key in ("settings", "rounds", "flops", "peak_flops"))
    precision = "float32"
    if found["device"] == "cuda":
        precision = (f"{s['amp_dtype']} and " if s["fp16"] else "") + ("TF32" if s["tf32"] else "float32")
    print(
        f"{found['method']}, {s['network']}, {s['num_classes']:,} classes, width {s['embedding_size']}, "
        f"{s['optimizer']}, {precision}, channels_last {s['channels_last']}, compile {s['compile']}; {s['data']}, "
        f"{s['num_workers']} workers; a step: {s['ranks']} ranks x {s['gradient_acc']} x {s['batch_size']} images"
    )
    print(found["machine"])
    by = ", seconds of the processor" if found["clock"] == "processor" else ""
    warmup = f"a warm-up of {found['warmup_seconds']:.1f} s"
    print(f"{len(rounds)} rounds of {found['steps']} steps after {warmup}; median (range){by}")
    for name, rate in found["images_per_second"].items():
        line = f"  {name:15s} {shown(rate, '.1f')} images/s"
        if name in found["ratio"]:
            line += f"   run / it {shown(found['ratio'][name], '.3f')}, best rounds {found['ratio_of_best'][name]:.3f}"
        print(line)
    print(f"  data wait       {shown(found['wait_share'], '.2%')} of the run's time")
    print(f"  memory          {in_mib(found['memory'])}")
    print(
        f"  FLOPs           {flops['per_image'] / 1e9:.3f} G an image in the backbone, of it "
        f"{flops['forward_per_image'] / 1e9:.3f} G forward; {flops['classifier_per_step'] / 1e9:.3f} G a step in a "
        "rank's classifier"
    )
    print(f"  MFU             {shown(found['mfu'], '.1%')} of {peak['median'] / 1e12:.3f} TFLOP/s: {peak['by']}")


def shown(values, form):
    return f"{values['median']:{form}} ({values['min']:{form}} to {values['max']:{form}})"


def in_mib(memory):
    return ", ".join(f"{name} {held / 2**20:.0f} MiB" for name, held in memory.items())


# --- One run, or several side by side --------------------------------------------------------------------------------


def measure(args, overrides, turn):
    """The figures of one run, on rank 0; None on the others."""
    distributed.init_distributed()
    with workspace() as folder:
        method = args.method or method_of(args.config)
        kind, cfg = trainer_class(method), make_config(args, overrides, folder)
        write_data(args, cfg, folder)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):     # the log has a file as well
            forget_peak()   # what it took to write the data
            trainer = kind(cfg)
            if trainer.steps_per_epoch < steps_needed(args):
                raise ConfigError(
                    f"{cfg.rec}: an epoch has {trainer.steps_per_epoch} steps, the rounds take {steps_needed(args)}; "
                    "lower --steps, --rounds or --batch_size, or use --draw or --rec synthetic without num_image"
                )
            clock = CLOCKS[args.clock]
            peak = make_peak(args, cfg, trainer.device, clock)
            rounds = Rounds(trainer, args, peak, turn, method in PLAIN, clock)
            rounds.measure()
        found = figures(rounds, method, f"{args.draw} drawn pictures" if args.draw else cfg.rec)
    return found if trainer.rank == 0 else None


def make_peak(args, cfg, device, clock):
    """What the MFU is measured by: --peak-tflops, else the GPU's data sheet, else a product of large matrices."""
    if args.peak_tflops:
        return StatedPeak(args.peak_tflops * 1e12, "--peak-tflops")
    if device.type != "cuda":
        return MeasuredPeak(device, torch.float32, clock)
    precision = cfg.amp_dtype if cfg.fp16 else "TF32" if cfg.tf32 else "float32"
    listed = StatedPeak.of(torch.cuda.get_device_name(device), precision)
    return listed or MeasuredPeak(device, getattr(torch, cfg.amp_dtype) if cfg.fp16 else torch.float32, clock)


def take_turns(out):
    """In a process of `compare`: say to `out` that a round may begin, and wait for the word."""
    print("ready", file=out, flush=True)
    if not sys.stdin.readline():
        raise SystemExit("the comparison has ended")


def compare(comparison, words):
    """`{value: figures}`, each by a process of its own, a round of each in turn; a value whose process fails is told.

    comparison: "KEY=VALUE,VALUE"; words: the rest of the command line.
    """
    key, _, values = comparison.partition("=")
    if "RANK" in os.environ or not values:
        raise ConfigError(f"--compare {comparison}: it takes KEY=VALUE,VALUE, on one rank: start it without torchrun")
    running, found = {}, {}

    def until_ready(value):
        line = running[value].stdout.readline()
        if line == "ready\n":
            return
        process = running.pop(value)
        process.stdin.close()
        if process.wait() == 0:
            found[value] = json.loads(line)
        else:
            code = process.returncode
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            print(f"{key} = {value}: {how}", flush=True)

    for value in values.split(","):
        command = [sys.executable, __file__, *words, f"--{key}={value}", "--in-turn"]
        running[value] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        until_ready(value)      # set-up and warm-up one after the other, too
    while running:
        for value in list(running):
            running[value].stdin.write("go\n")
            running[value].stdin.flush()
            until_ready(value)
    return found


def report_comparison(key, found):
    for value, its in found.items():
        print(f"--- {key} = {value}")
        report(its)
    print(f"--- {key}; images a second, and how many times the first's")
    for value, its in found.items():
        both = zip(next(iter(found.values()))["rounds"], its["rounds"])
        times = spread([first["run"] / here["run"] for first, here in both])
        print(
            f"  {value:10s} {shown(its['images_per_second']['run'], '.1f')}; {shown(times, '.3f')}; "
            f"warm-up {its['warmup_seconds']:.1f} s; {in_mib(its['memory'])}"
        )


def parse(words):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="config file; it comes first")
    parser.add_argument("--method", help="MixBCT, ..., arc or softmax; default: by the config's place and name")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps a round")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the first round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draw", type=int, default=0, metavar="N", help="a temporary record set of N drawn pictures")
    parser.add_argument("--fake-old", action="store_true", help="random features of an old model, in a temporary file")
    parser.add_argument("--peak-tflops", type=float, help="of the device, in the precision that is used; for the MFU")
    parser.add_argument("--compare", metavar="KEY=VALUE,VALUE", help="a process for each value, rounds in turn")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="see above (default: wall)")
    parser.add_argument("--json", metavar="FILE", help="write all figures and rounds to FILE")
    parser.add_argument("--in-turn", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args(words)
    if min(args.steps, args.warmup, args.rounds) < 1:
        parser.error("--steps, --warmup and --rounds must be at least 1")
    return args, overrides


def main(words=None):
    words = sys.argv[1:] if words is None else words
    args, overrides = parse(words)
    with report_errors():
        if args.in_turn:
            print(json.dumps(measure(args, overrides, functools.partial(take_turns, sys.stdout))))
            return
        if args.compare:
            at = next(i for i, word in enumerate(words) if word.split("=")[0] == "--compare")
            found = compare(args.compare, words[:at] + words[at + (1 if "=" in words[at] else 2):])
            report_comparison(args.compare.partition("=")[0], found)
        else:
            found = measure(args, overrides, lambda: None)
            if found is not None:
                report(found)
        if args.json and found is not None:
            pathlib.Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
        if args.compare and len(found) <= args.compare.count(","):
            sys.exit(1)


if __name__ == "__main__":
    main()
    distributed.shutdown()
