"""What a rank holds and waits for at 500 million images and 10 million classes: the plain way against this repo's.

    python benchmarks/bench_scale.py                        minutes, 3 GB on disk
    python benchmarks/bench_scale.py --lines 1000000        smaller, the index extrapolated from there

Prints a line for each part: the plain way (an index of Python arrays, a permutation, arrays in memory, all classes on
every rank) and ours, each measured on synthetic files and, where marked ×, extrapolated in proportion from the size
that was run. Two ranks by gloo; a rank's memory is its anonymous pages above those at the start, mapped files excluded.
"""

import functools
import multiprocessing
import pathlib
import sys
import tempfile
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the repo root

import numpy as np
import torch
import torch.distributed as dist

import record_index
from BCT_methods.AdvBCT.boundary import boundaries_by_ranks
from benchmarks import common
from benchmarks.common import PeakMemory, in_turns, machine, options, print_ratio, seconds
from engine.order import Shuffle
from losses import OldPrototypes
from losses.prototype import old_prototype_loss
from old_model.feature_set import RowFile

IMAGES, CLASSES, WIDTH, RANKS, BATCH = 500_000_000, 10_000_000, 512, 64, 128
GIB = 1 << 30


def line(what, plain, ours):
    print(f"{what:44s} {plain:34s} {ours}", flush=True)


def cost(function, factor=1.0):
    """Seconds and memory of a call, times factor, as text: × = extrapolated."""
    with PeakMemory() as peak:
        spent = seconds(function)
    sign = "" if factor == 1 else f"  × {factor:.0f}"
    return f"{spent * factor:9.3f} s  {peak.mib * factor / 1024:6.2f} GiB{sign}"


def index(folder, lines):
    idx, few = folder / "train.idx", folder / "few.idx"
    common.write_index_lines(idx, 10240 * np.arange(lines))
    common.write_index_lines(few, 10240 * np.arange(max(lines // 10, 1)))
    plain, ours = functools.partial(record_index._parsed, few), functools.partial(record_index.open_index, idx)
    with mock.patch.object(record_index, "SMALL", 0):  # a binary index for a short text, too
        print(f"binary index of {lines:,} lines, written once: {cost(ours)}", flush=True)
        line(".idx, opened", cost(plain, IMAGES / max(lines // 10, 1)), cost(ours))
        times = in_turns({"plain": plain, "ours": ours}, 2)
    print_ratio("text of a tenth of the lines / binary index", times["plain"], times["ours"], ".2f")


def shuffle(images):
    shuffled = Shuffle(IMAGES, 0, 0)
    plain, ours = lambda: np.random.default_rng(0).permutation(images), lambda: shuffled.rows(np.arange(BATCH))
    line("shuffle: an epoch; a batch of 128", cost(plain, IMAGES / images), cost(ours))


def labels_and_flags(folder, images):
    """Sparse .npy files: their zeros take no room on the disk."""
    paths = {folder / "label.npy": (np.int64, np.integer), folder / "credible.npy": (np.bool_, np.bool_)}
    for path, (dtype, _) in paths.items():
        np.lib.format.open_memmap(path, "w+", dtype, (IMAGES,))
    rows = np.random.default_rng(0).integers(0, IMAGES, BATCH)

    def plain():
        return [np.array(np.load(path, mmap_mode="r")[:images]) for path in paths]

    def ours():
        return [RowFile(path, 1, kind)[rows] for path, (_, kind) in paths.items()]

    line("labels, credible flags: all; a batch", cost(plain, IMAGES / images), cost(ours))


def prototypes_on_rank(classes):
    """GiB of the prototypes and logits of a step: `(with all classes, with this rank's)`."""
    embeddings, labels = torch.randn(BATCH, WIDTH), torch.arange(BATCH)
    with PeakMemory() as whole:
        old_prototype_loss(embeddings, labels, torch.randn(classes, WIDTH))
    with PeakMemory() as own:
        old = OldPrototypes(classes, WIDTH, stored=False)
        old.prototypes.normal_()
        held = old.prototypes.nbytes / GIB
        old(embeddings, labels)
    return whole.mib / 1024, own.mib / 1024, held


def boundaries_on_rank(folder, classes):
    """Seconds for AdvBCT's boundaries of the features in `folder`."""
    features, labels = RowFile(f"{folder}/feature.npy", 2, np.floating), np.load(f"{folder}/classes.npy")
    return (seconds(lambda: boundaries_by_ranks(features, labels, classes, lambda centers: None)),)


def _rank_main(rank, ranks, store, queue, function, args):
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    queue.put(function(*args))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def on_ranks(folder, ranks, function, *args):
    """The largest of each figure that `function(*args)` returns on the ranks."""
    context = multiprocessing.get_context("spawn")
    queue, store = context.Queue(), str(folder / f"store_{function.__name__}_{ranks}")
    processes = [
        context.Process(target=_rank_main, args=(rank, ranks, store, queue, function, args)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [queue.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return [max(values) for values in zip(*found)]


def classes_on_ranks(folder, ranks, classes, rows):
    few = CLASSES / classes
    whole, own, held = on_ranks(folder, ranks, prototypes_on_rank, classes)
    held *= few * ranks / RANKS
    line(
        "old prototypes and logits, memory",
        f"{whole * few:21.2f} GiB  × {few:.0f}",
        f"{own * few:21.2f} GiB  × {few:.0f} on {ranks} ranks; on {RANKS} {held:.2f} and the logits",
    )
    labels = np.arange(rows) * classes // rows  # class by class, as record files are
    np.save(folder / "classes.npy", labels)
    common.write_features(folder / "feature.npy", labels, classes, WIDTH)
    one, many = (on_ranks(folder, count, boundaries_on_rank, str(folder), classes) for count in (1, ranks))
    text = [f"{spent * 1e6 / rows:9.3f} s on {count}" for count, (spent,) in ((1, one), (ranks, many))]
    line("AdvBCT's boundaries, a million rows", *text)
    whole = CLASSES * WIDTH / GIB  # by count: float64 sums and float32 centres
    line("  their centres, computed", f"{12 * whole:21.2f} GiB on rank 0", f"{12 * whole / RANKS:21.2f} GiB on {RANKS}")
    print_ratio(f"boundaries on 1 rank / on {ranks}", one, many, ".2f")


def main():
    args = options(__doc__, lines=50_000_000, images=50_000_000, classes=20_000, rows=200_000, ranks=2)
    print(f"{IMAGES:,} images, {CLASSES:,} classes, {WIDTH} dimensions, batch {BATCH}; {machine()}")
    print("× n: measured at 1 / n of the size, and multiplied; else measured as it is")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        line("", "plain", "ours")
        index(folder, args.lines)
        shuffle(args.images)
        labels_and_flags(folder, args.images)
        classes_on_ranks(folder, args.ranks, args.classes, args.rows)


if __name__ == "__main__":
    main()
