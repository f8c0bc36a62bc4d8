"""The report's bootstrap at IJB-C's size, against writing out each resample's pairs and sorting them.

    python benchmarks/bench_bootstrap.py                 15,658,489 pairs of 3,531 people, 1,000 resamples
    python benchmarks/bench_bootstrap.py --scale 0.1     a tenth of the people, a hundredth of the pairs

Both give the TPR at FPR 1e-4, the plain way of one resample.
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the repo root

from benchmarks.bench_ijb import make_protocol
from benchmarks.common import PeakMemory, in_turns, machine, median, options, print_ratio, seconds
from tools.ijbc_eval.bootstrap import Bootstrap
from tools.ijbc_eval.roc import Roc
from tools.ijbc_eval.thresholds import Pool

FPR = 1e-4


def main():
    args = options(__doc__, scale=1.0, rounds=3, resamples=1000)
    rng = np.random.default_rng(0)
    _, pairs, subject, people = make_protocol(args.scale, rng)
    scores = (2.5 * pairs.label + rng.normal(size=len(pairs.label))).astype(np.float32)
    pool = Pool.of_all(pairs, subject.astype(np.int32), Bootstrap(people, args.resamples))
    print(f"{len(scores):,} pairs, {people:,} people, {args.resamples} resamples; {machine()}, numpy {np.__version__}")

    def plain():
        weight = pool.bootstrap.weights[0]
        counts = weight[pool.units.first] * weight[pool.units.second]
        return Roc(np.repeat(scores, counts), np.repeat(pairs.label, counts)).tpr_at(FPR)

    def ours():
        return pool.tpr_at(FPR, scores)

    with PeakMemory() as peak:
        once = seconds(lambda: pool.totals)
        difference = abs(ours()[0] - plain())
    print(f"totals, once a report: {once:.2f} s; {peak.mib:.0f} MiB; difference to plain: {difference:.1e}")
    times = in_turns({"ours": ours, "plain": plain}, args.rounds, warmup=0)
    print(f"ours, all resamples {median(times['ours'])} s, plain, one {median(times['plain'])} s")
    each = [spent / args.resamples for spent in times["ours"]]
    print_ratio("plain / ours, a resample", times["plain"], each, ".0f")


if __name__ == "__main__":
    main()
