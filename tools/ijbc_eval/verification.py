"""1:1: scores of template pairs, and an exact ROC over tens of millions of them."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

PROTOCOLS = ("exact", "published")  # how figures are computed, 1:1 here and 1:N in identification.py
FPRS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_BLOCK = 1 << 28  # entries of a score matrix in memory at once: 1 GiB
_DENSE_COST = 32  # about how many times faster a matrix product is, per entry, than gathering and multiplying a pair


def pair_scores(first_features, second_features, first, second):
    """Cosine of each pair: float32 [P].

    first_features [A, D], second_features [B, D]: float32, L2-normalised, of the templates that occur first and second.
    first, second: integer [P], rows of the pair's templates in those.

    Lists like IJB-C's pair a few thousand templates many times over: the whole score matrix is cheaper than gathering
    the features of every pair, and a score is then one look-up.
    """
    scores = np.empty(len(first), np.float32)
    columns = len(second_features)
    if len(first_features) * columns > _DENSE_COST * len(first):

        def multiply(part):
            np.einsum("pd,pd->p", first_features[first[part]], second_features[second[part]], out=scores[part])

        _in_parts(len(first), 1 << 14, multiply)
        return scores
    step = max(1, _BLOCK // columns)
    for start in range(0, len(first_features), step):
        block = (first_features[start : start + step] @ second_features.T).ravel()
        _look_up(block, start * columns, columns, first, second, scores)
    return scores


def _look_up(block, offset, columns, first, second, scores):
    """Fill in the scores of the pairs in `block`, the entries from `offset` on of the flattened score matrix."""

    def work(part):
        place = first[part].astype(np.int64)  # NumPy 1 would multiply int32 rows by an int64 scalar in int32
        place *= columns
        place += second[part]
        if not offset and place.max() < len(block):
            np.take(block, place, out=scores[part], mode="clip")  # the default, "raise", would copy via a buffer
        else:
            inside = (place >= offset) & (place < offset + len(block))
            scores[part][inside] = block[place[inside] - offset]

    _in_parts(len(first), 1 << 17, work)


def _in_parts(length, size, work):
    """Call `work(slice)` for all parts of `size` of a range, on one thread per core, at most eight: NumPy releases the
    GIL in its loops, and parts this small stay in the processor's cache."""
    parts = [slice(start, min(start + size, length)) for start in range(0, length, size)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(work, parts):
            pass


class Roc:
    """The ROC of scores [P] with labels [P] (true = same person), exact with ties; keeps both classes sorted.

    A pair is accepted if its score is above the threshold. ValueError if a class is missing or a score is NaN.
    """

    def __init__(self, scores, label):
        label = np.asarray(label, bool)
        scores = np.asarray(scores)
        self.genuine, self.impostor = scores[label], scores[~label]  # copies, sorted in place
        self.genuine.sort()
        self.impostor.sort()
        if not len(self.genuine) or not len(self.impostor):
            raise ValueError(
                f"a ROC needs pairs of both kinds; found {len(self.genuine)} genuine and {len(self.impostor)} impostor"
            )
        if np.isnan(self.genuine[-1]) or np.isnan(self.impostor[-1]):  # NaN sorts last
            raise ValueError("some scores are NaN; the model's embeddings are not finite")

    @property
    def auc(self):
        """P(genuine > impostor) + ½ P(equal): the area under the ROC (Mann-Whitney), from integer counts."""
        below = np.searchsorted(self.impostor, self.genuine, "left").sum(dtype=np.int64)
        not_above = np.searchsorted(self.impostor, self.genuine, "right").sum(dtype=np.int64)
        return float((int(below) + int(not_above)) / (2 * len(self.genuine) * len(self.impostor)))

    def tpr_at(self, fpr, protocol="exact"):
        """The largest TPR whose FPR does not exceed `fpr` (0 … 1); published: `nearest_tpr`.

        If at most k impostors may pass, the threshold is the (k+1)-th largest impostor score: at most k impostors are
        above it, and any lower threshold would let that one pass, with all that tie with it.
        """
        if protocol == "published":
            return self.nearest_tpr(fpr)
        return float(np.mean(self.genuine > self.threshold_at(fpr)))

    def threshold_at(self, fpr):
        allowed = most_allowed(fpr, len(self.impostor))
        return self.impostor[-1 - allowed] if allowed < len(self.impostor) else -np.inf

    def nearest_tpr(self, fpr):
        """The TPR of the ROC point whose FPR is nearest to `fpr`, as in insightface-derived scripts.

        Those use the points of sklearn's `roc_curve`, which drops collinear points, and of two equally near ones the
        one with the lower threshold. The nearest point may lie *above* the requested FPR, so this can exceed `tpr_at`:
        usually by one step of the ROC, by far more if impostor scores tie or are few.
        """
        fps, tps = self._corners()
        distance = np.abs(fps / len(self.impostor) - fpr)
        nearest = len(distance) - 1 - np.argmin(distance[::-1])
        return float(tps[nearest] / len(self.genuine))

    def _corners(self):
        """False and true positives at the ROC's corner points, from (0, 0) by descending threshold."""
        if not hasattr(self, "_corner_cache"):
            thresholds = np.unique(np.concatenate([self.genuine, self.impostor]))[::-1]
            fps = len(self.impostor) - np.searchsorted(self.impostor, thresholds, "left")
            tps = len(self.genuine) - np.searchsorted(self.genuine, thresholds, "left")
            bend = np.ones(len(thresholds), bool)
            bend[1:-1] = (np.diff(fps, 2) != 0) | (np.diff(tps, 2) != 0)
            self._corner_cache = np.append(0, fps[bend]), np.append(0, tps[bend])
        return self._corner_cache


def most_allowed(rate, total):
    """The largest integer k with k / total ≤ rate. Not floor(rate · total): 0.29 · 100 is 28.999999999999996."""
    allowed = min(int(rate * total), total)
    while allowed < total and (allowed + 1) / total <= rate:
        allowed += 1
    while allowed > 0 and allowed / total > rate:
        allowed -= 1
    return allowed


def summary(scores, label, fprs=FPRS, protocol="exact"):
    """`(TPR at each FPR float64 [len(fprs)], AUC)`."""
    roc = Roc(scores, label)
    return np.array([roc.tpr_at(fpr, protocol) for fpr in fprs]), roc.auc
