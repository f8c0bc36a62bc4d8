"""Tools that read millions of old features, each against a plain loop with one mask per class.

    python benchmarks/bench_features.py                     3.6 million × 128, the new part of MS1M-V3
    python benchmarks/bench_features.py --rows 200000       a smaller machine

Class means (BCT), credible rows (MixBCT), class boundaries (AdvBCT) and refined prototypes (UniBCT, using the same
features as the new model's) of a memory-mapped .npy file in random order, with log-normal class sizes. The loop's cost
is quadratic, so the ratio is measured on about --loop-rows rows in memory.
"""

import functools
import pathlib
import sys
import tempfile

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the repo root

from BCT_methods.AdvBCT.boundary import class_boundaries
from BCT_methods.UniBCT.prototypes import refine_prototypes
from benchmarks.common import PeakMemory, in_turns, machine, options, print_ratio, seconds, write_features
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
        credible[rows[np.argsort(distances, kind="stable")[: int(np.ceil(ratio * len(rows) - 1e-9))]]] = True
    return credible


def class_boundaries_plain(features, labels, num_classes):
    scaled = features / np.linalg.norm(features, axis=1, keepdims=True)
    centres = np.stack([scaled[labels == c].mean(axis=0) for c in range(num_classes)])
    radius = []
    for c in range(num_classes):
        d = np.sort(np.linalg.norm(scaled[labels == c] - centres[c], axis=1))
        q1, q3 = d[len(d) // 4], d[3 * len(d) // 4]
        radius.append(d[d <= q3 + 1.5 * (q3 - q1)].max() if len(d) >= 4 else d.max())
    return np.column_stack([centres, radius])


def prototypes_plain(features, labels, num_classes, damping=0.9, temperature=0.05):
    prototypes = np.empty((num_classes, features.shape[1]))
    for c in range(num_classes):
        rows = torch.from_numpy(features[labels == c]).double()
        if len(rows) > 1:
            similarity = F.normalize(rows) @ F.normalize(rows).T / temperature
            transition = similarity.fill_diagonal_(float("-inf")).softmax(dim=1)
            rows = (1 - damping) * torch.linalg.inv(torch.eye(len(rows)) - damping * transition) @ rows
        prototypes[c] = rows.mean(dim=0)
    return prototypes


def main():
    args = options(__doc__, rows=3_600_000, width=128, classes=65_402, loop_rows=100_000, rounds=1)

    classes, random = min(args.classes, args.rows // 10), np.random.default_rng(1)
    sizes = random.lognormal(sigma=0.8, size=classes)
    sizes = np.maximum(1, np.round(sizes * args.rows / sizes.sum())).astype(int)
    labels = random.permutation(np.repeat(np.arange(classes), sizes))
    some_classes = np.searchsorted(np.cumsum(np.bincount(labels)), min(args.loop_rows, len(labels))) + 1
    some = np.flatnonzero(labels < some_classes)
    tools = {
        "class means": (class_means, class_means_plain),
        "credible rows": (lambda features, labels, _: credible_rows(features, labels, 0.9), credible_rows_plain),
        "class boundaries": (lambda *args: np.column_stack(class_boundaries(*args)[:2]), class_boundaries_plain),
        "refined prototypes": (lambda f, labels, _: refine_prototypes(f, f, labels).cpu().numpy(), prototypes_plain),
    }
    print(f"{len(labels):,} x {args.width} float32, {classes:,} classes; the loop has {len(some):,} rows; {machine()}")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "feature.npy")
        write_features(path, labels, classes, args.width)
        features = np.load(path, mmap_mode="r")
        some_features, some_labels = features[some], labels[some]
        for name, (tool, loop) in tools.items():
            with PeakMemory() as peak:
                spent = seconds(lambda tool=tool: tool(features, labels, classes))
            print(f"{name}: {spent:.1f} s, {peak.mib:.0f} MiB beside the mapped file", flush=True)
            results = {}

            def run(way, results=results):
                results[way] = way(some_features, some_labels, some_classes)

            times = in_turns({way: functools.partial(run, way) for way in (tool, loop)}, args.rounds, warmup=0)
            # The loop's float32 sums may flip a close decision between two rows.
            if np.mean(np.isclose(results[tool], results[loop], atol=1e-4)) < 0.9999:
                sys.exit(f"{name}: the plain loop gives another result")
            print_ratio(f"plain loop / {name}", times[loop], times[tool], form=".1f")


if __name__ == "__main__":
    main()
