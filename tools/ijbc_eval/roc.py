"""An exact ROC of tens of millions of scores by counting: only the few scores whose order matters are sorted.

Scores fall into CELLS cells of equal width. Subtracting, scaling and truncating keep their order, ties included, so
which of two scores is higher is open only within a cell: impostors are sorted in the cells that hold a genuine score
(for the AUC) or a threshold, and counted elsewhere.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

CELLS = 1 << 16
PART = 1 << 17  # scores handled at once: small enough for the processor's cache


class Roc:
    """The ROC of scores [P] with labels [P] (true = same person), exact with ties.

    A pair is accepted if its score is above the threshold. fprs: rates whose thresholds will be asked for; others take
    another pass over the scores. ValueError if a class is missing or a score is not finite.
    """

    def __init__(self, scores, label, fprs=()):
        self.scores, self.label = np.asarray(scores), np.asarray(label, bool)
        if not np.issubdtype(self.scores.dtype, np.floating):
            self.scores = self.scores.astype(np.float64)
        self.genuine = np.sort(self.scores[self.label])
        self.num_impostor = len(self.label) - len(self.genuine)
        if not len(self.genuine) or not self.num_impostor:
            raise ValueError(
                f"a ROC needs pairs of both kinds; found {len(self.genuine)} genuine and {self.num_impostor} impostor"
            )
        self._low, self._scale = self._range()
        self._cells = np.empty(len(self.scores), np.uint16)
        in_cell = sum(in_parts(len(self.scores), self._count))
        self._genuine_cells = self._place(self.genuine)
        self._in_cell = in_cell - np.bincount(self._genuine_cells, minlength=CELLS)
        self._above = self.num_impostor - np.cumsum(self._in_cell)  # impostors in all higher cells
        self._sorted_cells = np.zeros(CELLS, bool)
        self._sorted_cells[self._genuine_cells] = True
        for fpr in fprs:
            self._sorted_cells[self._cell_of_threshold(fpr)] = True
        self._sorted = self._impostors_in(self._sorted_cells)

    def _range(self):
        ends = in_parts(len(self.scores), lambda part: (self.scores[part].min(), self.scores[part].max()))
        low, high = np.min(ends), np.max(ends)
        if not np.isfinite([low, high]).all():  # NaN is passed on by both
            raise ValueError("some scores are not finite; the model's embeddings are not finite")
        width = float(high) - float(low) or 1.0
        return low, self.scores.dtype.type(min((CELLS - 1) / width, np.finfo(self.scores.dtype).max))

    def _place(self, scores):
        """The cell of each score, uint16."""
        place = scores - self._low
        place *= self._scale
        return np.minimum(place, CELLS - 1, out=place).astype(np.uint16)

    def _count(self, part):
        self._cells[part] = self._place(self.scores[part])
        return np.bincount(self._cells[part], minlength=CELLS)

    def _impostors_in(self, wanted):
        """The impostor scores in the cells where `wanted`, bool [CELLS], is true, sorted."""

        def pick(part):
            rows = part.start + np.flatnonzero(wanted.take(self._cells[part]))
            return self.scores[rows[~self.label[rows]]]

        return np.sort(np.concatenate(in_parts(len(self.scores), pick)))

    @property
    def auc(self):
        """P(genuine > impostor) + ½ P(equal): the area under the ROC (Mann-Whitney), from integer counts."""
        sorted_below = np.cumsum(np.where(self._sorted_cells, self._in_cell, 0))[self._genuine_cells]
        counted = self.num_impostor - self._above[self._genuine_cells] - sorted_below  # in lower cells, not sorted
        below, not_above = (
            int(counted.sum() + np.searchsorted(self._sorted, self.genuine, side).sum()) for side in ("left", "right")
        )
        return (below + not_above) / (2 * len(self.genuine) * self.num_impostor)

    def tpr_at(self, fpr, protocol="exact"):
        """The largest TPR whose FPR does not exceed `fpr` (0 … 1); published: `nearest_tpr`.

        If at most k impostors may pass, the threshold is the (k+1)-th largest impostor score: at most k impostors are
        above it, and any lower threshold would let that one pass, with all that tie with it.
        """
        if protocol == "published":
            return self.nearest_tpr(fpr)
        above = len(self.genuine) - np.searchsorted(self.genuine, self.threshold_at(fpr), "right")
        return float(above / len(self.genuine))

    def threshold_at(self, fpr):
        allowed = most_allowed(fpr, self.num_impostor)
        if allowed == self.num_impostor:
            return -np.inf
        cell = self._cell_of_threshold(fpr)
        if self._sorted_cells[cell]:
            above = self._in_cell[cell + 1 :][self._sorted_cells[cell + 1 :]].sum()
            return self._sorted[-1 - above - (allowed - self._above[cell])]
        return self._impostors_in(np.arange(CELLS) == cell)[-1 - (allowed - self._above[cell])]

    def _cell_of_threshold(self, fpr):
        """The highest cell with no more impostors above it than may pass."""
        allowed = min(most_allowed(fpr, self.num_impostor), self.num_impostor - 1)
        return CELLS - np.searchsorted(self._above[::-1], allowed, "right")

    def nearest_tpr(self, fpr):
        """The TPR of the ROC point whose FPR is nearest to `fpr`, as in insightface-derived scripts.

        Those use the points of sklearn's `roc_curve`, which drops collinear points, and of two equally near ones the
        one with the lower threshold. The nearest point may lie *above* the requested FPR, so this can exceed `tpr_at`:
        usually by one step of the ROC, by far more if impostor scores tie or are few.
        """
        fps, tps = self._corners
        distance = np.abs(fps / self.num_impostor - fpr)
        nearest = len(distance) - 1 - np.argmin(distance[::-1])
        return float(tps[nearest] / len(self.genuine))

    @functools.cached_property
    def _corners(self):
        """False and true positives at the ROC's corner points, from (0, 0) by descending threshold; sorts all."""
        impostor = np.sort(self.scores[~self.label])
        thresholds = np.unique(np.concatenate([self.genuine, impostor]))[::-1]
        fps = len(impostor) - np.searchsorted(impostor, thresholds, "left")
        tps = len(self.genuine) - np.searchsorted(self.genuine, thresholds, "left")
        bend = np.ones(len(thresholds), bool)
        bend[1:-1] = (np.diff(fps, 2) != 0) | (np.diff(tps, 2) != 0)
        return np.append(0, fps[bend]), np.append(0, tps[bend])


def most_allowed(rate, total):
    """The largest integer k with k / total ≤ rate. Not floor(rate · total): 0.29 · 100 is 28.999999999999996."""
    allowed = min(int(rate * total), total)
    while allowed < total and (allowed + 1) / total <= rate:
        allowed += 1
    while allowed > 0 and allowed / total > rate:
        allowed -= 1
    return allowed


def in_parts(length, work, size=PART):
    """`[work(slice), ...]` of all parts of `size` of a range, on one thread per core, at most eight: NumPy releases the
    GIL."""
    parts = [slice(start, min(start + size, length)) for start in range(0, length, size)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, parts))
