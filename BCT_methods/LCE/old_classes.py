"""The old classes as LCE sees them: where each lies, and how far its old features reach."""

import numpy as np
import torch

from old_model.by_class import add_by_class, check_labels, normalise, row_chunks


def old_classes(old, num_classes, start, stop):
    """`(centers float32 [stop - start + 1, D], min_cosine float32 [stop - start + 1])` of the classes start … stop − 1.

    old: OldFeatures of num_classes classes. The centre of a class is the L2-normalised mean of its L2-normalised old
    features, its min_cosine the smallest cosine of one of them to it. A row of zeros is no feature; a class without
    features has a centre of zeros and −1. So has the last row, which stands for the classes of other ranks.
    The rows of these classes are read in chunks, twice; sums are in float64.
    Raises FeatureError for labels out of range and for non-finite rows.
    """
    features, labels = old.features, np.asarray(old.labels[:])
    check_labels(features, labels, num_classes)
    mine = np.flatnonzero((labels >= start) & (labels < stop))

    centers = np.zeros((stop - start + 1, features.shape[1]))
    for part, rows in row_chunks(features, mine):
        normalise(rows)
        add_by_class(centers, rows, labels[part] - start)
    normalise(centers)

    min_cosine = np.ones(len(centers))
    for part, rows in row_chunks(features, mine):
        normalise(rows)
        cosine = np.einsum("nd,nd->n", rows, centers[labels[part] - start])
        cosine[~rows.any(axis=1)] = 1
        np.minimum.at(min_cosine, labels[part] - start, cosine)
    min_cosine[~centers.any(axis=1)] = -1
    return torch.from_numpy(centers).float(), torch.from_numpy(min_cosine).float()
