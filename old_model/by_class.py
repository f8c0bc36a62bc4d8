"""Per-class sums, means and distances to the means, for millions of rows in any order, a chunk at a time.

Chunks are computed by threads and added up in order: the sums do not depend on their number. `ClassMeans` shares the
rows among the ranks.
"""

import collections
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy import sparse

from core.agreement import failing_together
from core.distributed import rank, rows_of_rank, sum_of_ranks, world_size
from old_model.feature_set import FeatureError, rewrite

CHUNK = 1 << 12  # rows handled at once: 4 MB in float64 at 128 dimensions, a core's cache
BUCKET = 1 << 23  # numbers that the ranks sum at once: 64 MB


def row_chunks(features, rows=None):
    """Yield `(part, values float64 [n, D])` of the rows int64 [R] (None: all) in order, n <= CHUNK; copies.

    part: indices of these rows, or a slice if all are read. Raises FeatureError for a non-finite row, with the file of
    memory-mapped features.
    """
    count = len(features) if rows is None else len(rows)
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        part = part if rows is None else rows[part]
        yield part, _values(features, part)


def _values(features, part):
    """The rows float64 [n, D] of a slice or of indices, a copy. Raises FeatureError for a non-finite row."""
    values = np.array(features[part], dtype=np.float64)
    if not np.isfinite(values.sum()):
        wrong = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        row = getattr(features, "first", 0) + (part.start + wrong if isinstance(part, slice) else part[wrong])
        path = getattr(features, "path", getattr(features, "filename", "the features"))
        raise FeatureError(f"{path}: row {row} is not finite; {rewrite(path)}")
    return values


def in_threads(function, count):
    """Yield `(part, function(part))` for the slices of `count` rows, in order; as many threads as torch uses."""
    threads = min(torch.get_num_threads(), -(-count // CHUNK))
    parts = (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
    if threads < 2:
        yield from ((part, function(part)) for part in parts)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque()
        for part in parts:
            waiting.append((part, pool.submit(function, part)))
            if len(waiting) > 2 * threads:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())


def _finished(part, future):
    return part, future.result()


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


def present(rows):
    """1 for each row of [n, D], 0 for a row of zeros, which is an image without a feature: float64 [n]."""
    return rows.any(axis=1).astype(np.float64)


def inverse_lengths(rows):
    """1 / |row| of float64 [n, D], 0 for a row of zeros: [n]."""
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def add_by_class(sums, rows, labels):
    """sums[c] += sum of the rows of class c, in place: sums [C, D], rows [n, D], labels [n] in any order, 0 … C − 1."""
    classes, totals = _totals(rows, labels, np.ones(len(rows)))
    sums[classes] += totals


def _totals(rows, labels, weights):
    """`(classes [c], totals [c, D])`: the sum of weight · row of each class among labels [n].

    A sparse product of class membership and rows: np.add.at would take the rows one by one.
    """
    order = np.argsort(labels, kind="stable")
    classes, first = np.unique(labels[order], return_index=True)
    member = (weights[order], order, np.append(first, len(rows)))
    return classes, sparse.csr_matrix(member, shape=(len(classes), len(rows))) @ rows


def class_sums(features, labels, num_classes, weigh=inverse_lengths, squares=None):
    """`(sum of weight · row of each class float64 [C, D], how many count int64 [C])`; zeros for a class without any.

    features: float [N, D], any scale; labels: int [N], any order, 0 … num_classes − 1. weigh: rows [n, D] -> weights
    [n], 0 for a row of zeros, which does not count; by default the rows are L2-normalised.
    squares: float64 [D]; each dimension's sum of squares over all weighted rows is added to it, in the same pass.
    Raises FeatureError for a non-finite row.
    """

    def of_chunk(part):
        rows = _values(features, part)
        weights = weigh(rows)
        classes, totals = _totals(rows, labels[part], weights)
        absent = labels[part][weights == 0]
        return classes, totals, absent, None if squares is None else np.square(weights) @ np.square(rows, out=rows)

    sums, counts = np.zeros((num_classes, features.shape[1])), np.bincount(labels, minlength=num_classes)
    for _, (classes, totals, absent, own) in in_threads(of_chunk, len(features)):
        sums[classes] += totals
        np.subtract.at(counts, absent, 1)
        if squares is not None:
            squares += own
    return sums, counts


def squared_distances_to_means(features, labels, means, weights=None):
    """Squared distance of each L2-normalised row to its class mean: float64 [N]; NaN for a row of zeros, no feature.

    features, labels: as of `class_sums`; means: float64 [C, D]. weights [D]: factors on the squares; None = 1.
    """

    def of_chunk(part):
        rows = _values(features, part)
        scale = inverse_lengths(rows)
        rows *= scale[:, None]
        rows -= means[labels[part]]
        found = np.einsum("nd,nd->n", rows, rows) if weights is None else np.square(rows, out=rows) @ weights
        found[scale == 0] = np.nan
        return found

    distances = np.empty(len(features))
    for part, found in in_threads(of_chunk, len(features)):
        distances[part] = found
    return distances


class OwnRows:
    """The rows `start` … `stop` − 1 of features [N, D], by slices, as features themselves."""

    def __init__(self, features, start, stop):
        self.features, self.first, self.count = features, start, stop - start
        self.shape = self.count, features.shape[1]
        self.path = getattr(features, "path", getattr(features, "filename", "the features"))

    def __len__(self):
        return self.count

    def __getitem__(self, part):
        return self.features[self.first + part.start : self.first + part.stop]


class ClassMeans:
    """Class means that the ranks compute together; each reads its share of the rows, in order.

    features: float [N, D]; labels: int [N], any order, 0 … num_classes − 1; both sliced, so that files will do.
    weigh, squares: of `class_sums`; squares is the sum over all ranks.

    `rows`, an OwnRows, and `position` [n]: this rank's rows, and the place of their classes among those that it has;
    `means` float64 [c, D] of these, not normalised again, once `totals` is exhausted; `counts` int64 [C], the features
    of each class on all ranks, without rows of zeros. On any number of ranks they are the same to float64's rounding.
    """

    def __init__(self, features, labels, num_classes, weigh=inverse_lengths, squares=None):
        self.part = slice(*rows_of_rank(len(features), rank(), world_size()))
        self.rows, own = OwnRows(features, self.part.start, self.part.stop), np.asarray(labels[self.part])
        with failing_together():
            check_labels(self.rows, own, num_classes)
            counts = np.bincount(own, minlength=num_classes)
            self.classes = np.flatnonzero(counts)
            self.position = (np.cumsum(counts > 0) - 1)[own]
            self.means, counts[self.classes] = class_sums(self.rows, self.position, len(self.classes), weigh, squares)
        self.counts = sum_of_ranks(counts)
        if squares is not None:
            squares[:] = sum_of_ranks(squares)

    def totals(self):
        """Yield `(a slice of classes, their sums over all ranks float64 [b, D])`; makes `means` those of all ranks."""
        width = self.means.shape[1]
        step = max(1, BUCKET // width)
        for first in range(0, len(self.counts), step):
            part = slice(first, min(first + step, len(self.counts)))
            own = slice(*np.searchsorted(self.classes, [part.start, part.stop]))
            total = np.zeros((part.stop - part.start, width))
            total[self.classes[own] - first] = self.means[own]
            total = sum_of_ranks(total)
            self.means[own] = (total / np.maximum(self.counts[part], 1)[:, None])[self.classes[own] - first]
            yield part, total

    def squared_distances(self, weights=None):
        """Of this rank's rows to their class means: float64 [n], see `squared_distances_to_means`."""
        return squared_distances_to_means(self.rows, self.position, self.means, weights)


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
