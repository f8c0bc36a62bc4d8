"""Select credible old features: those nearest to the mean of their class (MixBCT, arXiv:2308.06948).

    python tools/get_feature/denoise_credible.py --T 0.9 --SD f128_r18_softmax_class70

Reads <SD>_feature.npy and <SD>_label.npy and writes <SD>_credible_ratio_90_feature.npy beside them: bool [N], true for
the ceil(T · n) of a class's n images whose features lie nearest to the class mean. First rows are L2-normalised, then
each dimension is scaled to unit norm over the set, so that all dimensions weigh the same in the distance. With a
config, missing or outdated features are extracted first.
"""

import fractions
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from core import distributed
from core.errors import report_errors
from old_model.by_class import ClassMeans
from old_model.feature_set import FeatureError, open_feature_set, save_array
from tools.get_feature.cli import extract, make_parser, parse


def credible_rows(features, labels, ratio):
    """bool [N]: rows among the ceil(ratio · n) nearest to the mean of their class of n rows.

    features: float [N, D], memory-mapped or not; labels: int [N], any order, gaps allowed; ratio: in (0, 1].
    Distances are Euclidean, between rows L2-normalised and then scaled to unit norm in each dimension over the set;
    ties, to float32's precision, go to the earlier row. An all-zero dimension is ignored; a row of zeros, an image
    without a feature, is not credible and none of the n.
    The ranks share the rows; rank 0 returns the result, the others None.
    Raises FeatureError for a ratio outside (0, 1] or non-finite rows.
    """
    ratio = exact_ratio(ratio)
    position = labels - labels.min()
    if position.max() > len(labels):
        position = np.unique(labels, return_inverse=True)[1]
    counts = np.bincount(position)
    distances = distributed.gather_arrays(scaled_distances(features, position, len(counts)))
    if distances is None:
        return None
    present = counts - np.bincount(position[np.isnan(distances)], minlength=len(counts))
    kept = -(-present * ratio.numerator // ratio.denominator)  # the ceiling, in integers
    return nearest_rows(distances, position, counts, kept)


def nearest_rows(distances, position, counts, kept):
    """bool [N]: the kept[c] rows with the smallest distances of each class c of counts[c] rows; ties to earlier rows.

    distances: float32 [N], at least 0, or NaN, which comes last; position: int [N], class of each row.
    """
    bits = distances.view(np.uint32)  # floats from 0 on are in the order of their bits
    keys = position.astype(np.uint64) << np.uint64(32) | bits
    ordered, first, some = np.sort(keys), np.cumsum(counts) - counts, np.flatnonzero(kept)
    last = np.zeros(len(counts), np.uint64)
    last[some] = ordered[(first + kept - 1)[some]]
    credible = keys <= last[position]
    surplus = np.searchsorted(ordered, last, "right") - first > kept
    tied = np.flatnonzero(surplus[position])
    tied = tied[keys[tied] == last[position[tied]]]
    tied = tied[np.argsort(position[tied], kind="stable")]
    number = np.arange(len(tied)) - np.searchsorted(position[tied], position[tied])  # among the tied rows of its class
    room = kept - (np.searchsorted(ordered, last) - first)
    credible[tied[number >= room[position[tied]]]] = False
    return credible


def exact_ratio(ratio):
    """The ratio as written, a Fraction: ceil(0.9 · 10) must be 9, though the float 0.9 is slightly above 9/10."""
    exact = fractions.Fraction(str(ratio)).limit_denominator(10**6)
    if not 0 < exact <= 1:
        raise FeatureError(f"--T {ratio}: the credible share of each class must be more than 0 and at most 1")
    return exact


def scaled_distances(features, position, num_classes):
    """float32 [n]: squared distance of each of this rank's rows to its class mean, both scaled as in `credible_rows`;
    NaN for a row of zeros.

    position: int [N], class of each row, 0 … num_classes − 1. Two passes over the rows: dimension scales and class
    means are sums over the normalised rows, and the means of scaled rows are the scaled means. Computed in float64 and
    rounded to float32, so that equal distances, as of a class's only two rows, compare equal.
    """
    squares = np.zeros(features.shape[1])
    classes = ClassMeans(features, position, num_classes, squares=squares)
    for _ in classes.totals():
        pass
    weights = np.divide(1.0, squares, out=np.zeros_like(squares), where=squares > 0)
    return classes.squared_distances(weights).astype(np.float32)


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--T", type=float, default=0.9, help="credible share of each class, in (0, 1] (default: 0.9)")
    with report_errors():
        args, cfg, files = parse(parser, argv)
        distributed.init_distributed()
        if cfg is not None:
            extract(cfg, files, args)
        features, labels, made_from = open_feature_set(files)
        credible = credible_rows(features, labels, args.T)
        if distributed.is_main():
            save_array(files.credible(args.T), credible, "credible rows", ratio=args.T, **made_from)
            print(f"wrote {files.credible(args.T)}: {credible.sum()} of {len(credible)} rows are credible")
            if credible.all() and args.T < 1:
                print(f"warning: no row is left out: --T {args.T:g} of a class's images, rounded up, is all of them")
    distributed.shutdown()


if __name__ == "__main__":
    main()
