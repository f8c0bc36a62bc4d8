"""The figures: 1:1 over tens of millions of pairs, by the ROC of roc.py; 1:N, open set, without sorting any row."""

import dataclasses

import numpy as np

from engine.verification import accuracy_over_folds
from tools.ijbc_eval.roc import Roc, in_parts, most_allowed

PROTOCOLS = ("exact", "published")  # how figures are computed, 1:1 and 1:N
FPRS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_BLOCK = 1 << 28  # entries of a score matrix in memory at once: 1 GiB
_DENSE_COST = 32  # about how many times faster a matrix product is, per entry, than gathering and multiplying a pair
FPIRS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
TOP = (1, 5, 10)
FOLDS = 10


# --- 1:1 ------------------------------------------------------------------------------------------------------------


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

        in_parts(len(first), multiply, 1 << 14)
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

    in_parts(len(first), work)


def fold_accuracy(scores, label):
    """Ten-fold accuracy of cosines [P] with labels bool [P], as logged in training (engine/verification.py).

    Folds are contiguous tenths. If one of these has pairs of one kind only, as in a list sorted by label, the pairs of
    either kind are dealt to the folds in turn.
    """
    order = np.arange(len(label))
    if any(label[tenth].all() or not label[tenth].any() for tenth in np.array_split(order, FOLDS)):
        turn = np.where(label, np.cumsum(label), np.cumsum(~label)) % FOLDS
        order = np.argsort(turn, kind="stable")
    return accuracy_over_folds(2 - 2 * scores[order], label[order], FOLDS)


def verification_summary(scores, label, fprs=FPRS, protocol="exact"):
    """`(TPR at each FPR float64 [len(fprs)], AUC)`."""
    roc = Roc(scores, label, fprs)
    return np.array([roc.tpr_at(fpr, protocol) for fpr in fprs]), roc.auc


# --- 1:N ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Search:
    """All probes [Q] against one gallery.

    mated bool [Q]: the probe's subject is in the gallery. rank int32 [Q]: 1 + the number of other subjects that score
    at least as high as the probe's own (ties count against the probe); 0 if not mated. score float32 [Q]: for a mated
    probe its own entry's score if that is above all others, else −inf; for a non-mated probe the highest score.
    """

    mated: np.ndarray
    rank: np.ndarray
    score: np.ndarray

    def top(self, k):
        """Share of mated probes whose own entry ranks in the top k; NaN without mated probes."""
        ranks = self.rank[self.mated]
        return float(np.mean(ranks <= k)) if len(ranks) else float("nan")

    def threshold_at(self, fpir, protocol="exact"):
        """The lowest threshold above which at most a share `fpir` of the non-mated probes score; −inf without any.

        published: of the n non-mated scores in descending order the one at 0-based position max(int(n · fpir) − 1, 0).
        A hit must be strictly above it, so one non-mated probe fewer passes than `fpir` allows.
        """
        highest = self.score[~self.mated]
        if not len(highest):
            return -np.inf
        if protocol == "published":
            place = max(int(len(highest) * fpir) - 1, 0)
            return np.partition(highest, -1 - place)[-1 - place]
        allowed = most_allowed(fpir, len(highest))
        return np.partition(highest, -1 - allowed)[-1 - allowed] if allowed < len(highest) else -np.inf

    def tpir_at(self, fpir, protocol="exact"):
        """Share of mated probes whose own entry scores above all others and above the threshold; NaN if undefined."""
        if not self.mated.any() or self.mated.all():
            return float("nan")
        return float(np.mean(self.score[self.mated] > self.threshold_at(fpir, protocol)))


class Roster:
    """Who is asked for and who is in a gallery: reads ranks off score matrices. Subjects are integers.

    columns [G]: the order that the columns of a matrix must have, the gallery sorted by subject; mated bool [Q].
    """

    def __init__(self, gallery_subject, probe_subject):
        self.columns = np.argsort(gallery_subject, kind="stable")
        subjects, self._starts = np.unique(gallery_subject[self.columns], return_index=True)
        self._own = np.minimum(np.searchsorted(subjects, probe_subject), len(subjects) - 1)
        self.mated = subjects[self._own] == probe_subject

    def read(self, matrix, part):
        """`(rank, score)` as in Search of the probes `part`, a slice; matrix float32 [probes of the part, G].

        A subject with several gallery templates counts once, with the best of them.
        """
        own, mated = self._own[part], self.mated[part]
        if len(self._starts) < matrix.shape[1]:
            matrix = np.maximum.reduceat(matrix, self._starts, axis=1)
        own_score = matrix[np.arange(len(matrix)), own]
        as_high = np.count_nonzero(matrix >= own_score[:, None], axis=1)  # includes the own entry
        score = np.where(mated, np.where(as_high == 1, own_score, -np.inf), matrix.max(axis=1))
        return np.where(mated, as_high, 0).astype(np.int32), score.astype(np.float32)


def search(gallery, gallery_subject, probes, probe_subject, chunk=1024):
    """Search probes float32 [Q, D] in a gallery float32 [G, D], both L2-normalised.

    ValueError if a feature is not finite: no score is above a NaN, so it would count as found.
    """
    if not (np.isfinite(gallery).all() and np.isfinite(probes).all()):
        raise ValueError("some features are not finite")
    roster = Roster(gallery_subject, probe_subject)
    gallery = np.ascontiguousarray(gallery[roster.columns].T)
    found = Search(roster.mated, np.zeros(len(probes), np.int32), np.empty(len(probes), np.float32))
    for start in range(0, len(probes), chunk):
        part = slice(start, start + chunk)
        found.rank[part], found.score[part] = roster.read(probes[part] @ gallery, part)
    return found


def mean_top(searches, k, protocol="exact"):
    """Top-k over the galleries: the mean; published: hits in all galleries / all probes."""
    if protocol == "published":
        return pooled_top([one.rank for one in searches], k)
    return float(np.mean([one.top(k) for one in searches]))


def mean_tpir(searches, fpir, protocol="exact"):
    return float(np.mean([one.tpir_at(fpir, protocol) for one in searches]))


def pooled_top(ranks, k):
    """Hits / all probes; ranks int [Q], or [G, Q] to count hits in every gallery."""
    ranks = np.asarray(ranks)
    return float(np.count_nonzero((ranks > 0) & (ranks <= k)) / ranks.shape[-1])


def identification_summary(searches, mixed_rank=None, protocol="exact", fpirs=FPIRS, top=TOP):
    """Top-k [R, len(top)] and TPIR [R, len(fpirs)]: a row per gallery, their mean, and if published "mixed".

    mixed_rank int32 [Q]: ranks in the merged galleries, needed for published; that row has no TPIR (NaN).
    """
    tops = [[one.top(k) for k in top] for one in searches]
    tpirs = [[one.tpir_at(fpir, protocol) for fpir in fpirs] for one in searches]
    tops.append([mean_top(searches, k, protocol) for k in top])
    tpirs.append([mean_tpir(searches, fpir, protocol) for fpir in fpirs])
    if protocol == "published":
        tops.append([pooled_top(mixed_rank, k) for k in top])
        tpirs.append([np.nan] * len(fpirs))
    return np.array(tops), np.array(tpirs)
