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
from old_model.by_class import squared_distances_to_means, unit_class_means
from old_model.feature_set import FeatureError, open_feature_set, save_array
from tools.get_feature.cli import extract, make_parser, parse


def credible_rows(features, labels, ratio):
    """bool [N]: rows among the ceil(ratio · n) nearest to the mean of their class of n rows.

    features: float [N, D], memory-mapped or not; labels: int [N], any order, gaps allowed; ratio: in (0, 1].
    Distances are Euclidean, between rows L2-normalised and then scaled to unit norm in each dimension over the set;
    ties, to float32's precision, go to the earlier row. An all-zero dimension is ignored.
    Raises FeatureError for a ratio outside (0, 1] or non-finite rows.
    """
    ratio = exact_ratio(ratio)
    _, position, counts = np.unique(labels, return_inverse=True, return_counts=True)
    distances = scaled_distances(features, position, len(counts))
    kept = -(-counts * ratio.numerator // ratio.denominator)  # the ceiling, in integers
    order = np.lexsort((distances, position))  # by class, then distance; stable, so then by row
    first = np.cumsum(counts) - counts
    rank = np.arange(len(order)) - np.repeat(first, counts)
    credible = np.empty(len(order), dtype=bool)
    credible[order] = rank < np.repeat(kept, counts)
    return credible


def exact_ratio(ratio):
    """The ratio as written, a Fraction: ceil(0.9 · 10) must be 9, though the float 0.9 is slightly above 9/10."""
    exact = fractions.Fraction(str(ratio)).limit_denominator(10**6)
    if not 0 < exact <= 1:
        raise FeatureError(f"--T {ratio}: the credible share of each class must be more than 0 and at most 1")
    return exact


def scaled_distances(features, position, num_classes):
    """float32 [N]: squared distance of each row to its class mean, both scaled as in `credible_rows`.

    position: int [N], class of each row, 0 … num_classes − 1. Two passes over the rows: dimension scales and class
    means are sums over the normalised rows, and the means of scaled rows are the scaled means. Computed in float64 and
    rounded to float32, so that equal distances, as of a class's only two rows, compare equal.
    """
    squares = np.zeros(features.shape[1])
    means = unit_class_means(features, position, num_classes, squares)
    weights = np.divide(1.0, squares, out=np.zeros_like(squares), where=squares > 0)
    return squared_distances_to_means(features, position, means, weights).astype(np.float32)


def main(argv=None):
    parser = make_parser(__doc__, config_needed=False)
    parser.add_argument("--T", type=float, default=0.9, help="credible share of each class, in (0, 1] (default: 0.9)")
    with report_errors():
        args, cfg, files = parse(parser, argv)
        distributed.init_distributed()
        if cfg is not None:
            extract(cfg, files, args)
        if distributed.is_main():
            features, labels, made_from = open_feature_set(files)
            credible = credible_rows(features, labels, args.T)
            save_array(files.credible(args.T), credible, "credible rows", ratio=args.T, **made_from)
            print(f"wrote {files.credible(args.T)}: {credible.sum()} of {len(credible)} rows are credible")
            if credible.all() and args.T < 1:
                print(f"warning: no row is left out: --T {args.T:g} of a class's images, rounded up, is all of them")
    distributed.shutdown()


if __name__ == "__main__":
    main()
