"""Select credible old features by the entropy of their soft assignment to the classes (NCCL).

    python tools/get_feature/credible_entropy.py --SD f128_r18_softmax_class70

Reads <SD>_feature.npy and <SD>_label.npy and writes <SD>_credible_entropy_feature.npy beside them: bool [N], for NCCL's
key `credible_old_feature`. With a config, missing or outdated features are extracted first. Every feature is compared
with every class, so 3.6 million features and 65,402 classes need a GPU; one is used if available.

The paper (arXiv:2108.03372) filters out features that lie between classes, by an entropy. In full, with L2-normalised
features g_i of class y_i and class means m_c, not normalised again:

    d_ic = ||g_i - m_c||                        distance of a feature to a class
    v    = var_i d_i,y_i                        variance of the distances to the own class, over all features
    p_ic = exp(-d_ic / v) / sum_k exp(-d_ik / v)
    H_i  = -sum_c p_ic ln p_ic                  0: one class only; ln(C): uniform
    feature i is credible if H_i <= ln(C) / 2

The variance is over all features, not per class: a class of two images has none (both are equally far from their
mean), and a loose class with its own v would attract all other classes' features. What is dropped are features near no
class. With few classes there are hardly any, since the nearest class still stands out.
"""

import math
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

import torch
from tqdm import tqdm

from core import distributed
from core.distributed import rows_of_rank
from core.errors import report_errors
from old_model.by_class import ClassMeans, OwnRows, count_classes, normalise, row_chunks
from old_model.feature_set import FeatureError, open_feature_set, save_array
from tools.get_feature.cli import extract, make_parser, parse

BLOCK = 1 << 24  # distances computed at once: 64 MB in float32, and a few copies


def low_entropy_rows(features, labels, device="cpu"):
    """bool [N]: rows whose assignment entropy is at most ln(C) / 2.

    features: float [N, D], memory-mapped or not, any scale; labels: int [N], 0 ... C - 1 in any order.
    A row of zeros, an image without a feature, is not credible; a class of such images is none of the C.
    The ranks share the rows; rank 0 returns the result, the others None.
    Raises FeatureError for non-finite rows, labels out of range or a class without images.
    """
    means, variance = means_and_variance(features, labels)
    own = OwnRows(features, *rows_of_rank(len(features), distributed.rank(), distributed.world_size()))
    entropy = assignment_entropy(own, means, variance, device)
    return distributed.gather_arrays(entropy <= math.log(len(means)) / 2)  # NaN is not


def means_and_variance(features, labels):
    """`(m float32 [C, D], v)`: means of the normalised rows of the classes that have any, variance of the distances to
    the own mean."""
    classes, means = ClassMeans(features, labels, len(count_classes(labels))), []
    for part, totals in classes.totals():
        counts = classes.counts[part]
        means.append((totals[counts > 0] / counts[counts > 0, None]).astype(np.float32))
    distances, count = np.sqrt(classes.squared_distances()), max(1, int(classes.counts.sum()))
    distances = distances[~np.isnan(distances)]
    mean = distributed.sum_of_ranks(distances.sum(keepdims=True)) / count
    variance = distributed.sum_of_ranks(np.square(distances - mean).sum(keepdims=True)) / count
    return np.concatenate(means), float(variance[0])


def assignment_entropy(features, means, variance, device="cpu"):
    """H float32 [N], in [0, ln C], as defined above, NaN for a row of zeros; with zero variance p is 1 for the nearest
    class."""
    device = torch.device(device)
    means = torch.from_numpy(means).to(device)
    squares = means.square().sum(1)
    variance = max(float(variance), 1e-6)  # above float32's rounding of distances between 0 and 2
    step = max(1, BLOCK // len(means))
    entropy = np.empty(len(features), dtype=np.float32)
    with tqdm(total=len(features), unit="row", desc="entropy", disable=None) as progress:
        for part, rows in row_chunks(features):
            normalise(rows)
            rows = torch.from_numpy(rows).to(device, torch.float32)
            blocks = [_entropy(block, means, squares, variance) for block in rows.split(step)]
            entropy[part] = torch.where(rows.any(dim=1), torch.cat(blocks), math.nan).cpu().numpy()
            progress.update(len(rows))
    return entropy


def _entropy(rows, means, squares, variance):
    """H [n] of rows [n, D] against means [C, D] of squared norms [C]."""
    distance = torch.addmm(squares, rows, means.T, alpha=-2).add_(rows.square().sum(1, keepdim=True))
    distance = distance.clamp_(min=0).sqrt_()
    nearest = distance.amin(1, keepdim=True)
    scores = distance.sub_(nearest).div_(-variance)  # ln p up to a constant, at most 0
    odds = scores.exp()
    total = odds.sum(1)
    return total.log() - odds.mul_(scores).sum(1) / total  # -sum p (score - ln total)


def main(argv=None):
    parser = make_parser(__doc__)
    with report_errors():
        args, cfg, files = parse(parser, argv)
        _, _, device = distributed.init_distributed()
        if cfg is not None:
            extract(cfg, files, args)
        features, labels, made_from = open_feature_set(files)
        credible = low_entropy_rows(features, labels, device)
        if distributed.is_main():
            path = files.feature.with_name(f"{files.name}_credible_entropy_feature.npy")
            if not credible.any():
                raise FeatureError(
                    f"{files.feature}: no row has an entropy of at most ln(classes) / 2, nothing written; "
                    "check that the old model is trained"
                )
            save_array(path, credible, "credible rows", **made_from)
            print(f"wrote {path}: {credible.sum()} of {len(credible)} rows are credible")
    distributed.shutdown()


if __name__ == "__main__":
    main()
