"""Kill runs and resume them, for as long as you like: `make soak MINUTES=60`.

    python tests/soak.py --minutes 20 --seed 1

Takes turns through methods, one to three ranks and configs drawn from the seed. Each run is killed with SIGKILL about a
dozen times, at random moments and in the lines where files take their names, and must then have left bit for bit what
the undisturbed run leaves (tests/kills.py). The first difference, hanging rank or other error ends the soak with 1;
its directory stays, and `--seed` with the number printed for it begins with that run.
"""

import argparse
import collections
import os
import pathlib
import shutil
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch comes in
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the repo root

import numpy as np

from tests.kills import draw_kills, kill_and_resume, make_task, whole_run

METHODS = ("MixBCT", "NCCL", "AdvBCT", "UniBCT", "BCT", "L2")
RANKS = (1, 2, 3)
KILLS, OUTSIDE = 10, 3  # of each run, if it does not end before


def draw_task(folder, seed):
    """A run of the seed's method, ranks and keys. Six seeds take all methods, eighteen all methods on all ranks."""
    random = np.random.default_rng(seed)
    method, ranks = METHODS[seed % len(METHODS)], RANKS[seed // len(METHODS) % len(RANKS)]
    keys = {
        "batch_size": int(random.integers(2, 5)),
        "gradient_acc": int(random.integers(1, 3)),
        "num_epoch": int(random.integers(3, 7)),
        "num_workers": int(random.integers(0, 3)),
        "checkpoint_steps": int(random.integers(1, 6)),
        "save_all_states": bool(random.integers(2)),
        "sample_rate": float(random.choice([0.5, 1.0])),
        "dropout": float(random.choice([0.0, 0.2])),
        "deterministic": ranks > 2,  # else DDP rebuilds its buckets after the first step of each attempt
        **[{}, {"optimizer": "adamw", "lr": 1e-3}][random.integers(2)],
        **[{}, {"val_targets": ["pairs"], "verbose": int(random.integers(2, 6))}][random.integers(2)],
    }
    if method == "NCCL" and keys["sample_rate"] < 1:  # its logit loss takes all classes
        keys["beta"] = 0.0
    if method == "UniBCT":  # its prototypes are refined in between; written beside the checkpoints
        keys |= {"compat_start_epoch": 0, "refine_epochs": [1, 2]}
    return make_task(folder, method, ranks, seed=seed, **keys), keys


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="no new run begins after so many (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next has the next one (default: 0)")
    args = parser.parse_args()
    begin, seed, counts = time.monotonic(), args.seed, collections.Counter()
    while time.monotonic() - begin < 60 * args.minutes:
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f"soak_{seed}_"))
        task, keys = draw_task(folder, seed)
        print(f"seed {seed}: {task.method} on {task.ranks} ranks, {keys}; {folder}", flush=True)
        kills = draw_kills(np.random.default_rng([seed, 1]), task, *whole_run(task), KILLS, OUTSIDE)
        killed = kill_and_resume(task, kills, tell=lambda line: print("   ", line, flush=True))
        counts.update(runs=1, kills=killed)
        counts[f"{task.method} on {task.ranks}"] += killed
        shutil.rmtree(folder)
        seed += 1
    minutes = (time.monotonic() - begin) / 60
    print(
        f"{counts.pop('runs')} runs survived {counts.pop('kills')} kills in {minutes:.0f} minutes, bit for bit: "
        + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    )


if __name__ == "__main__":
    main()
