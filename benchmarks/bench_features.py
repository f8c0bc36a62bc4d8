"""Class means and credible rows of millions of features: seconds, memory, and the ratio to the plain loop over classes.

    python benchmarks/bench_features.py                     3.6 million × 128, the new part of MS1M-V3
    python benchmarks/bench_features.py --rows 200000       a smaller machine

The features lie in a temporary .npy file, memory-mapped as the tools have them, in shuffled order of classes unless
--sorted. The plain loop makes one mask over all labels for each class, so its cost is quadratic: it is timed on about
--loop_rows rows in the same run, and the tools beside it. Memory is what the process holds beyond its start; pages of
the mapped file, which all ranks share and the system may drop at any time, are told apart from its own.
"""

import argparse
import functools
import pathlib
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))   # the repo root

from benchmarks.common import PeakMemory, write_features
from tools.get_feature.denoise_credible import credible_rows
from tools.get_feature.get_avg_feature import class_means


def class_means_plain(features, labels, num_classes):
    means = np.stack([features[labels == c].mean(axis=0) for c in range(num_classes)])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def credible_rows_plain(features, labels, num_classes, ratio=0.9):
    scaled = features / np.linalg.norm(features, axis=1, keepdims=True)
    scaled = scaled / np.linalg.norm(scaled, axis=0, keepdims=True)
    credible = np.zeros(len(features), dtype=bool)
    for c in range(num_classes):
        rows = np.flatnonzero(labels == c)
        distances = np.linalg.norm(scaled[rows] - scaled[rows].mean(axis=0), axis=1)
        credible[rows[np.argsort(distances, kind="stable")[:int(np.ceil(ratio * len(rows) - 1e-9))]]] = True
    return credible


def seconds(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def first_classes(features, labels, rows):
    """About `rows` rows in memory: those of the first classes, in their order."""
    classes = np.searchsorted(np.cumsum(np.bincount(labels)), rows) + 1
    chosen = np.flatnonzero(labels < classes)
    return features[chosen], labels[chosen], classes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3_600_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--classes", type=int, default=65_402)
    parser.add_argument("--loop_rows", type=int, default=400_000, help="rows that the plain loop gets")
    parser.add_argument("--sorted", action="store_true", help="classes one after the other")
    args = parser.parse_args()

    random = np.random.default_rng(1)
    classes = min(args.classes, args.rows)
    labels = np.append(np.arange(classes), random.integers(0, classes, args.rows - classes))
    labels = np.sort(labels) if args.sorted else random.permutation(labels)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "feature.npy"
        centres = random.standard_normal((classes, args.width), dtype=np.float32)
        write_features(path, labels, centres, random)
        features = np.load(path, mmap_mode="r")
        some = first_classes(features, labels, min(args.loop_rows, args.rows))
        print(f"{args.rows} x {args.width} float32 ({features.nbytes / 1e6:.0f} MB), {classes} classes")
        for name, fast, plain in (
            ("class means", class_means, class_means_plain),
            ("credible rows", functools.partial(credible_rows, ratio=0.9), credible_rows_plain),
        ):
            features = np.load(path, mmap_mode="r")     # a new mapping, of which no page is counted yet
            with PeakMemory() as peak:
                whole, _ = seconds(fast, features, labels)
            small, result = seconds(fast, *some[:2])
            loop, expected = seconds(plain, *some)
            # Float32 sums of the plain loop may turn a close decision between two rows.
            if result.dtype == bool:
                equal = (result == expected).mean() > 0.9999
            else:
                equal = np.allclose(result, expected, atol=1e-5)
            memory = f"{peak.own / 1e6:.0f} MB of its own, {peak.mapped / 1e6:.0f} MB of mapped file pages"
            print(
                f"{name:14s} {whole:6.1f} s, {memory}; {len(some[0])} rows, {some[2]} classes: {small:.2f} s, "
                f"plain loop {loop:.2f} s, ratio {loop / small:.1f}"
            )
            if not equal:
                sys.exit(f"{name}: the plain loop comes to another result")


if __name__ == "__main__":
    main()
