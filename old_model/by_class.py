"""Per-class sums, means and distances to the means, for millions of rows in any order, a chunk at a time."""

import numpy as np
from scipy import sparse

from old_model.feature_set import FeatureError, rewrite

CHUNK = 1 << 15  # rows handled at once: 32 MB in float64 at 128 dimensions


def row_chunks(features, rows=None):
    """Yield `(part, values float64 [n, D])` of the rows int64 [R] (None: all) in order, n <= CHUNK; copies.

    part: indices of these rows, or a slice if all are read. Raises FeatureError for a non-finite row, with the file of
    memory-mapped features.
    """
    count = len(features) if rows is None else len(rows)
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        part = part if rows is None else rows[part]
        values = np.array(features[part], dtype=np.float64)
        if not np.isfinite(values.sum()):
            wrong = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            row = start + wrong if rows is None else part[wrong]
            path = getattr(features, "path", getattr(features, "filename", "the features"))
            raise FeatureError(f"{path}: row {row} is not finite; {rewrite(path)}")
        yield part, values


def chunks(features, labels):
    """As `row_chunks` of all rows, with their labels [n]: yields `(slice, rows, labels)`."""
    for part, rows in row_chunks(features):
        yield part, rows, np.asarray(labels[part])


def check_labels(features, labels, num_classes):
    """Raise FeatureError unless there is a label per row of `features`, 0 … num_classes − 1."""
    if len(labels) != len(features):
        raise FeatureError(f"{len(features)} features, but {len(labels)} labels; run get_feature again")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise FeatureError(
            f"labels go from {labels.min()} to {labels.max()}, but there are {num_classes} classes; "
            "run get_feature again"
        )


def normalise(rows):
    """L2-normalise each row in place; rows of zeros stay zero."""
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    rows /= np.where(norms > 0, norms, 1.0)[:, None]


def add_by_class(sums, rows, labels):
    """sums[c] += sum of the rows of class c, in place: sums [C, D], rows [n, D], labels [n] in any order, 0 … C − 1.

    A sparse product of class membership and rows: np.add.at would take the rows one by one.
    """
    order = np.argsort(labels, kind="stable")
    classes, first = np.unique(labels[order], return_index=True)
    last = np.append(first, len(rows))
    member = sparse.csr_matrix((np.ones(len(rows)), order, last), shape=(len(classes), len(rows)))
    sums[classes] += member @ rows


def unit_class_means(features, labels, num_classes, squares=None):
    """Class means of the L2-normalised rows, not normalised again: float64 [C, D], zeros for a class without rows.

    features: float [N, D], any scale; labels: int [N], any order, 0 … num_classes − 1.
    squares: float64 [D]; each dimension's sum of squares over all rows is added to it, in the same pass.
    Raises FeatureError for a non-finite row.
    """
    means = np.zeros((num_classes, features.shape[1]))
    for _, rows, classes in chunks(features, labels):
        normalise(rows)
        if squares is not None:
            squares += np.einsum("nd,nd->d", rows, rows)
        add_by_class(means, rows, classes)
    means /= np.maximum(np.bincount(labels, minlength=num_classes), 1)[:, None]
    return means


def squared_distances_to_means(features, labels, means, weights=None):
    """Squared distance of each L2-normalised row to its class mean: float64 [N].

    features, labels, means: as in `unit_class_means`. weights: factor on each dimension's square, [D]; None = 1.
    """
    distances = np.empty(len(features))
    for part, rows, classes in chunks(features, labels):
        normalise(rows)
        rows -= means[classes]
        if weights is None:
            distances[part] = np.einsum("nd,nd->n", rows, rows)
        else:
            np.square(rows, out=rows)
            distances[part] = np.einsum("nd,d->n", rows, weights)
    return distances


def count_classes(labels, num_classes=None):
    """Images per class: int64 [C], C = num_classes or the largest label + 1.

    Raises FeatureError for labels out of range and for a class without images.
    """
    low, high = int(np.min(labels)), int(np.max(labels))
    if low < 0 or high >= (num_classes or len(labels)):
        allowed = f"the record file has {num_classes} classes" if num_classes else f"there are {len(labels)} images"
        raise FeatureError(f"labels go from {low} to {high}, but {allowed}; run get_feature again")
    counts = np.bincount(labels, minlength=num_classes or 0)
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        raise FeatureError(
            f"class {empty[0]} has no image ({len(empty)} of {len(counts)} classes have none) and so no mean; "
            "rewrite the record file with labels 0 … C − 1 without gaps"
        )
    return counts
