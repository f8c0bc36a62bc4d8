"""95 % intervals by a bootstrap over subjects; all tests of a report are read on the same resamples, hence paired.

Images of one person are not independent, and neither are pairs that share a person, so people are drawn, not pairs: a
resample draws as many subjects as there are, with replacement, and w_s is how often subject s was drawn. A genuine pair
or a query of s then counts w_s times, an impostor pair of a and b w_a · w_b times (copies of one person are never an
impostor pair). Galleries stay as enrolled, so 1:N figures are those of this gallery. In each resample the threshold of
an FPR or FPIR is found anew, exactly and with ties, on the weighted scores. An interval is the 2.5th to the 97.5th
percentile over the resamples, of a difference that of the differences. How often
such intervals cover the truth depends on the number of people and errors: Fogliato, Patil and Perona, Confidence
Intervals for Error Rates in 1:1 Matching Tasks, arXiv:2306.01198.
"""

import dataclasses

import numpy as np
from scipy import sparse

from tools.ijbc_eval.roc import most_allowed

PERCENT = 95
FEWEST = 10  # errors that a rate's interval needs: a resample cannot have what has not happened
FEWEST_PEOPLE = 20  # that a yes or no needs: intervals of fewer are too narrow
_SPARE = 1024  # impostors looked at beyond twice those allowed


@dataclasses.dataclass
class Units:
    """What is counted: pairs or queries. first, second int32 [N]: rows of their subjects, second −1 if there is only
    one: a query, a genuine pair."""

    first: np.ndarray
    second: np.ndarray

    @classmethod
    def of_pairs(cls, first, second):
        return cls(first, np.where(first == second, -1, second))

    @classmethod
    def of_queries(cls, subject):
        return cls(subject, np.full(len(subject), -1))

    def __len__(self):
        return len(self.first)

    def __getitem__(self, chosen):
        return Units(self.first[chosen], self.second[chosen])


class Bootstrap:
    """`resamples` draws of `subjects` people; rates are float64 [resamples], NaN where nothing was drawn to count."""

    def __init__(self, subjects, resamples, seed=0):
        draws = np.random.default_rng(seed).multinomial(subjects, np.full(subjects, 1 / subjects), resamples)
        self.weights = np.ones((resamples, subjects + 1), np.int32)  # row −1, the second subject of a query, counts 1
        self.weights[:, :-1] = draws
        self._columns = np.ascontiguousarray(self.weights.T, np.float64)

    def total(self, units):
        """The weight of all units in each resample: wᵀ N w with N the number of units of each pair of subjects, since
        there are far fewer of those than pairs. Whole numbers, exact in float64."""
        size = self.weights.shape[1]
        low, high = np.minimum(units.first, units.second % size), np.maximum(units.first, units.second % size)
        counts = sparse.coo_matrix((np.ones(len(units)), (low, high)), (size, size)).tocsr()
        return np.einsum("sb,sb->b", self._columns, counts @ self._columns)

    def share(self, units, of):
        """The weight of `units` as a share of the total weight `of`, float64 [resamples]."""
        with np.errstate(invalid="ignore"):
            return self.total(units) / of

    def tpr_at(self, rate, genuine, genuine_units, impostor, impostor_units, impostor_total):
        """The largest TPR whose FPR does not exceed `rate`, as metrics.Roc.tpr_at, in each resample; TPIR and FPIR too.

        genuine, impostor: scores [G], [I]; impostor_total: `total(impostor_units)`, the same for every model.

        No resample is sorted: the threshold is the first impostor from the top at which the weights add up to more than
        the FPR allows, so only the top of the list is needed, and one order of it for all resamples.
        """
        if not len(genuine):
            return np.full(len(self.weights), np.nan)
        order = np.argsort(-genuine)
        genuine, genuine_units = -genuine[order], genuine_units[order]  # negated: ascending, for searchsorted
        allowed = [most_allowed(rate, int(total)) if total else 0 for total in impostor_total]
        kept = 2 * most_allowed(rate, len(impostor)) + _SPARE
        found, todo = np.full(len(self.weights), np.nan), np.flatnonzero(impostor_total > 0)
        while len(todo):
            top = _largest(impostor, kept)
            top_scores, top_units, short = impostor[top], impostor_units[top], []
            for row in todo:
                place = np.searchsorted(self._cumulative(row, top_units), allowed[row], "right")
                if place == len(top) < len(impostor):
                    short.append(row)
                    continue
                threshold = top_scores[place] if place < len(top) else -np.inf
                hits = self._cumulative(row, genuine_units)
                above = np.searchsorted(genuine, -threshold, "left")
                if hits[-1]:
                    found[row] = hits[above - 1] / hits[-1] if above else 0.0
            todo, kept = short, 4 * kept
        return found

    def tpir_at(self, fpir, searches, queries):
        """TPIR at `fpir`, the mean over the galleries, in each resample. searches: a metrics.Search for each gallery;
        queries: Units of all probes."""
        rates = []
        for one in searches:
            mated, others = queries[one.mated], queries[~one.mated]
            scores = one.score[one.mated], one.score[~one.mated]
            rates.append(self.tpr_at(fpir, scores[0], mated, scores[1], others, self.total(others)))
        return np.mean(rates, axis=0)

    def _cumulative(self, row, units):
        weight = self.weights[row]
        return np.cumsum(weight[units.first] * weight[units.second], dtype=np.int64)


def _largest(scores, count):
    """Rows of the `count` largest scores, in descending order."""
    rows = np.argpartition(scores, -count)[-count:] if count < len(scores) else np.arange(len(scores))
    return rows[np.argsort(-scores[rows])]


def interval(values):
    """[low, high] of the resamples' values, NaN left out; None if there are none."""
    values = values[np.isfinite(values)]
    tail = (100 - PERCENT) / 200
    return np.quantile(values, [tail, 1 - tail]).tolist() if len(values) else None


def verdict(differences, people, errors):
    """Does M(new, old) exceed M(old, old)? "yes" or "no" if the interval of the difference says so, else "undecided".

    A difference of 0 does not exceed, so "no" needs an interval that ends at 0 or below. people: with genuine pairs or
    mated queries; errors: how many impostors or strangers may pass. Few people, or none that may pass, decide nothing.
    """
    found = interval(differences)
    if found is None or people < FEWEST_PEOPLE or not errors:
        return "undecided"
    return "yes" if found[0] > 0 else "no" if found[1] <= 0 else "undecided"
