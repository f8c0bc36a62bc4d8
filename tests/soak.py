"""Kill training runs and tools and start them again, for as long as you like: `make soak MINUTES=60`.

    python tests/soak.py --minutes 20 --seed 1

Takes turns through methods and tools, one to three ranks and options drawn from the seed. Each is killed with SIGKILL
about a dozen times, at random moments of its whole life and in the lines where files take their names, and must then
have left bit for bit what the undisturbed run leaves (tests/kills.py). The first difference, hanging rank or other
error ends the soak with 1; its directory stays, and `--seed` with the number printed for it begins with that run.
"""

import argparse
import collections
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch comes in
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the repo root

import numpy as np

from tests.kills import draw_kills, kill_and_rerun, make_training
from tests.tools.test_kill_and_rerun import TOOLS, make_tool

METHODS = ("MixBCT", "NCCL", "AdvBCT", "UniBCT", "BCT", "L2", "RACT", "LCE")
RANKS = (1, 2, 3)
EXTRACTION = ("", "--num_workers 0 --batch_size 7", "--num_workers 2 --batch_size 4")
EVALUATION = ("", "--protocol published", "--workers 0 --batch_size 5")
OPTIONS = {
    "split_dataset.split_dataset_ms1mv3": ("", "--ratio 0.4"),
    "get_feature.get_feature": EXTRACTION,
    "get_feature.get_avg_feature": EXTRACTION,
    "get_feature.denoise_credible": EXTRACTION,
    "ijbc_eval.ijbc_eval": (*EVALUATION, "-N", "-B -E", "-N -L"),
    "ijbc_eval.compat_report": (*EVALUATION, "--independent {old}:tiny"),
}
KILLS, OUTSIDE = 8, 5  # of each


def draw_training(folder, seed):
    """A run of the seed's method, ranks and keys. Eight seeds take all methods, 24 all methods on all ranks."""
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
    if method == "LCE" and keys["sample_rate"] < 1:  # its alignment takes all centres
        keys["align_weight"] = 0.0
    if method == "UniBCT":  # its prototypes are refined in between; written beside the checkpoints
        keys |= {"compat_start_epoch": 0, "refine_epochs": [1, 2]}
    return make_training(folder, method, ranks, seed=seed, **keys), keys


def draw_tool(folder, seed):
    """The seed's tool and ranks, with options, and files of another run there before or none."""
    random = np.random.default_rng(seed)
    name, ranks = list(TOOLS)[seed % len(TOOLS)], RANKS[seed // len(TOOLS) % len(RANKS)]
    options = random.choice(OPTIONS[name])
    alone = not name.startswith("get_feature")
    drawn = {"options": str(options), "afresh": bool(random.integers(3) == 0)}
    return make_tool(folder, name, 1 if alone else ranks, seed=seed, **drawn), drawn


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="nothing new begins after so many (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the first turn; the next has the next one (default: 0)")
    parser.add_argument("--only", choices=("training", "tools"), help="take no turns")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))  # else what it has started would go on
    subjects = {"training": [draw_training], "tools": [draw_tool]}.get(args.only, [draw_training, draw_tool])
    begin, seed, counts = time.monotonic(), args.seed, collections.Counter()
    while time.monotonic() - begin < 60 * args.minutes:
        for draw in subjects:
            folder = pathlib.Path(tempfile.mkdtemp(prefix=f"soak_{seed}_"))
            task, drawn = draw(folder, seed)
            print(f"seed {seed}: {task}, {drawn}; {folder}", flush=True)
            task.whole_run()
            kills = draw_kills(np.random.default_rng([seed, 1]), task, KILLS, OUTSIDE)
            counts[str(task)] += kill_and_rerun(task, kills, tell=lambda line: print("   ", line, flush=True))
            shutil.rmtree(folder)
        seed += 1
    minutes = (time.monotonic() - begin) / 60
    print(f"{counts.total()} kills in {minutes:.0f} minutes, survived bit for bit:")
    for name, count in sorted(counts.items()):
        print(f"{count:6d} {name}")


if __name__ == "__main__":
    main()
