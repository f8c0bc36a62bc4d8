"""Draw the demo data: procedural faces as a training set (.rec) and as an evaluation set shaped like IJB-C.

    python tools/demo_data/draw_demo_data.py --root demo/dataset --seed 0
    python tools/demo_data/draw_demo_data.py --sheet faces.png

writes ROOT/ms1m-retinaface-t1/train.{rec,idx}, ROOT/ms1m-retinaface-t1/demo.bin and ROOT/IJBC/{meta,loose_crop}.
The files depend on the options and the seed, not on the number of processes. Files of an earlier run with the same
options are kept: ROOT/demo_data.json records the options and a digest of the drawing code.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import shutil
import signal
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

import cv2
import numpy as np
from tqdm import tqdm

from core.config import expand
from core.errors import report_errors
from core.files import atomic_write, lock
from tools.demo_data import ijb, records

TRAINING_DIR = "ms1m-retinaface-t1"
STAMP = "demo_data.json"
SHEET_ROWS, SHEET_COLUMNS = 6, 10


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def option(name, kind, default, text):
        parser.add_argument(name, type=kind, default=default, help=f"{text} (default: {default})")

    option("--root", expand, pathlib.Path("demo/dataset"), "directory to write")
    option("--seed", _at_least(0), 0, "random seed")
    option("--identities", _at_least(2), 1000, "people in the training set")
    option("--images", _at_least(1), 10, "images per person")
    option("--eval-identities", _at_least(4), 200, "people in the IJB-C set, none of them in the training set")
    option("--probes", _at_least(1), 5, "probe templates per person of the IJB-C set")
    option("--pairs", _at_least(1), 200_000, "limit on 1:1 pairs; all mated pairs are kept")
    option("--verification-pairs", _at_least(0), 300, "pairs in demo.bin; 0: no such file")
    option("--variation", _at_least(0.0), 1.0, "how much images of one person differ, a factor")
    option("--processes", _at_least(1), os.cpu_count() or 1, "worker processes")
    parser.add_argument("--sheet", type=expand, metavar="FILE.png", help="draw a contact sheet only")
    return parser.parse_args(argv)


def _at_least(low):
    """An argparse type: a number of the type of `low`, at least `low`."""

    def number(text):
        value = type(low)(text)
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        return value

    return number


@contextlib.contextmanager
def _workers(processes):
    """An ordered map, `over(function, tasks)`, in one process or several, with a progress bar on a terminal."""

    def bar(results, tasks):
        return tqdm(results, total=len(tasks), unit=" people", disable=None)

    if processes == 1:
        yield lambda function, tasks: bar(map(function, tasks), tasks)
        return
    # Spawn, not fork: OpenCV's and BLAS's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, _start_worker) as pool:
        try:
            yield lambda function, tasks: bar(pool.map(function, tasks, chunksize=4), tasks)
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C


def _start_worker():
    """Draw with one thread; a second one ends the worker when its parent is gone, even if that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends the workers
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)  # sys.exit would only end this thread


def _stamp(args):
    """What the files depend on: the options and the drawing code."""
    digest = hashlib.sha256()
    for source in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    free = ("root", "processes", "sheet")
    return {"options": {k: v for k, v in vars(args).items() if k not in free}, "code": digest.hexdigest()}


def _read_stamp(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write_stamp(path, stamp, complete):
    with atomic_write(path) as file:
        file.write((json.dumps({**stamp, "complete": complete}, indent=1) + "\n").encode())


def outputs(args):
    """The paths that a run writes."""
    training = args.root / TRAINING_DIR
    paths = [training / "train.rec", training / "train.idx", args.root / "IJBC"]
    return paths + [training / "demo.bin"] * (args.verification_pairs > 0)


def draw(args):
    """Draw the data unless it is up to date; returns whether it drew. Refuses to replace files that it did not draw."""
    stamp, path = _stamp(args), args.root / STAMP
    found = _read_stamp(path)
    if found == {**stamp, "complete": True} and all(p.exists() for p in outputs(args)):
        return False
    foreign = [p for p in outputs(args) if p.exists()] if not path.exists() else []
    if foreign:
        raise SystemExit(f"{foreign[0]} exists but is not demo data (there is no {path}); choose another --root")
    args.root.mkdir(parents=True, exist_ok=True)
    with lock(args.root / ".lock"), _workers(args.processes) as over:
        _write_stamp(path, stamp, complete=False)
        _draw_all(args, over)
        _write_stamp(path, stamp, complete=True)
    return True


def _draw_all(args, over):
    """Write the IJB-C set last: if it is there, everything is."""
    training = args.root / TRAINING_DIR
    shutil.rmtree(args.root / "IJBC", ignore_errors=True)
    (training / "demo.bin").unlink(missing_ok=True)
    records.write_training_set(training / "train.rec", args.seed, args.identities, args.images, args.variation, over)
    if args.verification_pairs:
        records.write_verification_set(training / "demo.bin", args.seed, args.verification_pairs, args.variation, over)
    ijb.write_ijb(args.root / "IJBC", args.seed, args.eval_identities, args.probes, args.pairs, args.variation, over)


def draw_sheet(args):
    """Write a contact sheet: a row of images for each of the first people of the training set."""
    rows = []
    for number in range(SHEET_ROWS):
        images = records.aligned_images(args.seed, records.TRAINING, number, SHEET_COLUMNS, args.variation)
        rows.append(np.concatenate([image for image, _ in images], axis=1))
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.sheet) as file:
        file.write(cv2.imencode(".png", np.concatenate(rows))[1].tobytes())
    print(f"{args.sheet}: {len(rows)} people, {SHEET_COLUMNS} images each")


def main(argv=None):
    args = parse_arguments(argv)
    cv2.setNumThreads(1)
    if args.sheet:
        draw_sheet(args)
        return
    started = time.perf_counter()
    if draw(args):
        print(
            f"{args.root}: {args.identities} people × {args.images} images to train on, "
            f"{args.eval_identities} others to evaluate on, drawn in {time.perf_counter() - started:.0f} s"
        )
    else:
        print(f"{args.root}: already drawn with these options, kept")


if __name__ == "__main__":
    with report_errors():
        main()
