"""Compute the class means of an old model's features: BCT's synthesised old classifier.

    python tools/get_feature/get_avg_feature.py configs/f128_r18_softmax_class30.py --SD f128_r18_softmax_class70

Reads <SD>_feature.npy and <SD>_label.npy and writes <SD>_avg_feature.npy beside them: float32 [C, D], row c = the
mean of the features of class c, L2-normalised. With a config, missing or outdated features are extracted first, and
the number of classes is checked against the record file's header.
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from core import distributed
from core.errors import report_errors
from dataset import open_train_set
from old_model.by_class import ClassMeans, count_classes, present
from old_model.feature_set import FeatureError, open_feature_set, save_array
from tools.get_feature.cli import extract, make_parser, parse, record_path


def class_means(features, labels, num_classes=None):
    """L2-normalised mean of the features of each class.

    features: float [N, D], memory-mapped or not, as the model gave them; labels: int [N], 0 … C − 1 in any order;
    num_classes: C, None = the largest label + 1. Returns float32 [C, D]; sums are float64. The ranks share the rows.
    A row of zeros is an image without a feature; a class of such images only has zeros.
    Raises FeatureError for a class without images, labels out of range or non-finite rows.
    """
    classes = ClassMeans(features, labels, len(count_classes(labels, num_classes)), weigh=present)
    means = np.zeros((len(classes.counts), features.shape[1]), np.float32)
    for part, totals in classes.totals():
        norms = np.linalg.norm(totals, axis=1, keepdims=True)  # normalised, so no need to divide by the count
        there = classes.counts[part] > 0
        if not norms[there].all():
            wrong = part.start + np.flatnonzero(there)[np.argmin(norms[there])]
            raise FeatureError(f"class {wrong}: its features sum to zero; check that the old model is trained")
        means[part][there] = totals[there] / norms[there]
    return means


def main(argv=None):
    parser = make_parser(__doc__)
    with report_errors():
        args, cfg, files = parse(parser, argv)
        distributed.init_distributed()
        num_classes = None
        if cfg is not None:
            extract(cfg, files, args)
            num_classes = open_train_set(record_path(cfg, files)).num_classes
        features, labels, made_from = open_feature_set(files)
        means = class_means(features, labels, num_classes)
        if distributed.is_main():
            save_array(files.avg_feature, means, "class means", **made_from)
            print(f"wrote {files.avg_feature}: {means.shape[0]} classes")
            if without := int((~means.any(axis=1)).sum()):
                print(f"{without} of them have no old feature: their rows are zero")
    distributed.shutdown()


if __name__ == "__main__":
    main()
