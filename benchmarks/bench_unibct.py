"""How long UniBCT's refinement takes, and what the plain way takes: one inverse a class, in float64.

A twentieth of MS1M-V3's 70 % part, and what the whole would take; or the whole, with 3.7 GB of disk in --dir:

    python benchmarks/bench_unibct.py
    python benchmarks/bench_unibct.py --images 3600000 --classes 65402

Features are random directions around random class centres. Class sizes are spread log-normally, so that some classes
have several hundred images. Time grows with the number of classes where their sizes are spread alike.
"""

import argparse
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))   # the repo root

import numpy as np
import torch

from BCT_methods.UniBCT.prototypes import refine_prototypes
from benchmarks.common import PeakMemory, write_features

FULL = (3_600_000, 65_402)      # images and classes of MS1M-V3's 70 % part


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=FULL[0] // 20)
    parser.add_argument("--classes", type=int, default=FULL[1] // 20)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plain", type=int, default=300, help="classes that the plain way refines, for the comparison")
    parser.add_argument("--shuffle", action="store_true", help="images in random order instead of class by class")
    parser.add_argument("--dir", help="where the features are written; default: a temporary directory")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    labels = np.repeat(np.arange(args.classes), class_sizes(rng, args.images, args.classes))
    if args.shuffle:
        rng.shuffle(labels)
    sizes = np.bincount(labels)
    print(
        f"{len(labels)} images x {args.dim}, {args.classes} classes of {sizes.min()} to {sizes.max()} images, "
        f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        folder = pathlib.Path(folder)
        for name in ("old", "new"):
            centres = rng.standard_normal((args.classes, args.dim), dtype=np.float32)
            write_features(folder / f"{name}.npy", labels, centres, rng)
        old, new = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("old", "new"))
        with PeakMemory() as memory:
            start = time.perf_counter()
            prototypes = refine_prototypes(old, new, labels, device=args.device).cpu()
            seconds = time.perf_counter() - start
        print(f"refinement: {seconds:.1f} s, {memory.own / 1e9:.2f} GB beside the mapped files")
        if len(labels) < FULL[0]:
            print(f"  all {FULL[1]} classes at this spread: {seconds * FULL[1] / args.classes / 60:.1f} min")
        compare_with_plain(rng, old, new, labels, prototypes, min(args.plain, args.classes), args.device)


def compare_with_plain(rng, old, new, labels, prototypes, number, device):
    chosen = rng.choice(len(prototypes), number, replace=False)
    members = [np.flatnonzero(labels == c) for c in chosen]
    rows = np.concatenate(members)
    some_old, some_new = old[rows], new[rows]
    some_labels = np.repeat(np.arange(number), [len(member) for member in members])
    ends = np.cumsum([len(member) for member in members])[:-1]
    start = time.perf_counter()
    expected = torch.stack([plain(v, n) for v, n in zip(np.split(some_old, ends), np.split(some_new, ends))])
    plainly = time.perf_counter() - start
    start = time.perf_counter()
    refine_prototypes(some_old, some_new, some_labels, device=device)
    ours = time.perf_counter() - start
    difference = (prototypes[torch.from_numpy(chosen)].double() - expected).abs().amax(dim=1)
    error = (difference / expected.norm(dim=1)).max()
    print(
        f"{number} classes: plainly, in float64, {plainly:.2f} s; here {ours:.2f} s ({plainly / ours:.1f}x); "
        f"largest difference of a prototype's value {error:.1e} of the prototype's norm"
    )


def plain(old, new, damping=0.9, temperature=0.05):
    """One class by the formula as it stands, in float64."""
    old, new = torch.from_numpy(old).double(), torch.nn.functional.normalize(torch.from_numpy(new).double(), dim=1)
    if len(old) == 1:
        return old[0]
    similarity = new @ new.T / temperature
    transition = similarity.fill_diagonal_(float("-inf")).softmax(dim=1)
    ensemble = (1 - damping) * torch.linalg.inv(torch.eye(len(old)).double() - damping * transition) @ old
    return ensemble.mean(dim=0)


def class_sizes(rng, images, classes):
    sizes = rng.lognormal(sigma=0.8, size=classes)
    return np.maximum(1, np.round(sizes * images / sizes.sum())).astype(int)


if __name__ == "__main__":
    main()
