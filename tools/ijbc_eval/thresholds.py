"""Does the deployed threshold hold? Error rates at it, a map of scores that keeps its FMR, and rates by cohort.

A pair is accepted if its score is above the threshold. FMR is the share of impostor pairs accepted, FNMR that of
genuine pairs refused.
"""

import dataclasses
import functools

import numpy as np

from tools.ijbc_eval.ascii_table import is_number
from tools.ijbc_eval.bootstrap import FEWEST, Units, interval
from tools.ijbc_eval.files import EvalError

_PER_DECADE = 10  # knots of a map
_GRID = 61  # points of the curves that are drawn


@dataclasses.dataclass
class ScoreMap:
    """s' = F_oo⁻¹(F(s)), F and F_oo the distributions of impostor scores of a test and of old/old: a score is mapped to
    the one that as many old/old impostors exceed, so a threshold on s' has the FMR that it has on old/old.

    fmr, score, mapped float64 [K]: share of impostors above `score`, and above `mapped` on old/old; straight lines in
    between. The largest fmr is 1 − 10 / impostors and the least 10 / impostors; scores outside follow the line from the
    median through the last knot, which keeps their order and claims nothing.
    """

    fmr: np.ndarray
    score: np.ndarray
    mapped: np.ndarray

    @classmethod
    def fit(cls, impostor, reference):
        """From the impostor scores [N] of a test and of old/old, for the same pairs; None for fewer than 40."""
        total = len(impostor)
        if total < 4 * FEWEST:
            return None
        decades = np.log10(total / 2 / FEWEST)
        half = np.rint(np.geomspace(FEWEST, total / 2, max(2, round(_PER_DECADE * decades)))).astype(int)
        above = np.unique(np.concatenate([half, total - half]))[::-1]
        score, mapped = (np.sort(scores)[total - 1 - above].astype(float) for scores in (impostor, reference))
        last_of_equals = np.append(np.diff(score) > 0, True)
        return cls(*(values[last_of_equals] for values in (above / total, score, mapped)))

    @functools.cached_property
    def _line(self):
        """`score` and `mapped` with an end on either side, further away than two cosines are apart."""
        middle = np.argmin(np.abs(self.fmr - 0.5))
        across, along = (values[[0, -1]] - values[middle] for values in (self.score, self.mapped))
        slope = np.divide(along, across, out=np.ones(2), where=across != 0)
        far = np.array([-4, 4])
        score = np.insert(self.score, [0, len(self.score)], self.score[[0, -1]] + far)
        return score, np.insert(self.mapped, [0, len(self.mapped)], self.mapped[[0, -1]] + far * slope)

    def __call__(self, scores):
        """Mapped scores, float32 of the same shape."""
        return np.interp(scores, *self._line).astype(np.float32)

    def threshold(self, mapped):
        """The score that is mapped to `mapped`: what to set instead of mapping scores."""
        return float(np.interp(mapped, *self._line[::-1]))


class Pool:
    """Some of the pairs, at whose error rates one looks; rows: {"fmr": of impostor, "fnmr": of genuine pairs}, units:
    of all P pairs."""

    def __init__(self, rows, units, bootstrap=None):
        self.rows = rows
        self.units, self.bootstrap = units, bootstrap

    @functools.cached_property
    def totals(self):
        """Weight of all pairs in each resample, {"fmr", "fnmr": float64 [resamples]}."""
        return {key: self.bootstrap.total(self.units[rows]) for key, rows in self.rows.items()}

    @classmethod
    def of_all(cls, pairs, subject, bootstrap=None):
        """pairs: protocol.Pairs; subject int [T]: whose each template is."""
        units = Units.of_pairs(
            subject[pairs.first_templates][pairs.first], subject[pairs.second_templates][pairs.second]
        )
        kinds = {"fmr": ~pairs.label, "fnmr": pairs.label}
        return cls({key: np.flatnonzero(kind).astype(np.int32) for key, kind in kinds.items()}, units, bootstrap)

    def within(self, group, number):
        """The pairs both of whose people are in one group; group int [S]: the number of each person's."""

        def chosen(rows):
            first, second = self.units.first[rows], self.units.second[rows]
            return rows[(group[first] == number) & ((second < 0) | (group[second] == number))]

        return Pool({key: chosen(rows) for key, rows in self.rows.items()}, self.units, self.bootstrap)

    def tpr_at(self, fpr, scores):
        """TPR at `fpr` in each resample; scores float32 [P], of all pairs."""
        genuine, impostor = self.rows["fnmr"], self.rows["fmr"]
        found = scores[genuine], self.units[genuine], scores[impostor], self.units[impostor]
        return self.bootstrap.tpr_at(fpr, *found, self.totals["fmr"])

    def rates(self, scores, threshold):
        """{"fmr", "fnmr": share or None without pairs, "interval": {…: [low, high] or None}, "errors": {…: count}}.

        scores float32 [P], of all pairs. No interval for fewer than FEWEST errors.
        """
        found = {"interval": {}, "errors": {}}
        for key, rows in self.rows.items():
            above = scores[rows] > threshold
            errors = rows[above if key == "fmr" else ~above]
            found[key] = len(errors) / len(rows) if len(rows) else None
            found["errors"][key] = len(errors)
            known = self.bootstrap and len(errors) >= FEWEST
            shares = self.bootstrap.share(self.units[errors], self.totals[key]) if known else None
            found["interval"][key] = interval(shares) if known else None
        return found

    def curves(self, scores, grid):
        """FMR and FNMR at thresholds `grid` [K], evenly spaced, to draw them: {"fmr": [K], "fnmr": [K]}."""
        found, ends = {}, (-grid[-1], -grid[0])
        for key, rows in self.rows.items():
            # Negated, since a histogram's cells contain their lower end, and a score at the threshold is below it.
            inside = np.histogram(np.clip(-scores[rows], *ends), len(grid) - 1, ends)[0]
            above = np.append(np.cumsum(inside)[::-1], 0) / max(len(rows), 1)
            found[key] = [float(f"{value:.6g}") for value in (above if key == "fmr" else 1 - above)]
        return found


class Deployed:
    """The deployed threshold and what it means for other tests of the same pairs.

    pairs: the Pool of all pairs, among `subjects` people; old float32 [P]: the old/old scores; threshold: the deployed
    one. cohorts: `(names, group int [subjects], −1: in none)` or None.

    A map is fitted on one half of the people, drawn by the seed, and judged on the other; pairs across the halves
    belong to neither. Intervals take the map as given.
    """

    def __init__(self, pairs, subjects, old, threshold, cohorts=None, seed=0):
        self.threshold, self.old = threshold, old
        half = np.random.default_rng(seed).permutation(subjects) % 2
        self.fitted = pairs.within(half, 0).rows["fmr"]
        self.pools = {"all": pairs, "held out": pairs.within(half, 1)}
        self.cohorts = {
            which: {name: pool.within(cohorts[1], number) for number, name in enumerate(cohorts[0])}
            for which, pool in self.pools.items()
            if cohorts
        }
        self.grid = np.linspace(-1, 1, 2 * _GRID - 1)
        above = np.count_nonzero(old[self.fitted] > threshold)
        self.claimed = FEWEST <= above <= len(self.fitted) - FEWEST

    def fit(self, scores):
        """The map of a test's scores [P] to the scale of old/old, a ScoreMap, or None for too few impostors."""
        return ScoreMap.fit(scores[self.fitted], self.old[self.fitted])

    def read(self, scores, pool="all"):
        """Rates at the threshold, and by cohort; a dict, with the curves of the pool."""
        found = self.pools[pool].rates(scores, self.threshold)
        found["pairs"] = pool
        found["curves"] = self.pools[pool].curves(scores, self.grid)
        if self.cohorts:
            found["cohorts"] = {name: one.rates(scores, self.threshold) for name, one in self.cohorts[pool].items()}
        return found

    def read_mapped(self, scores, score_map):
        """`read` of the mapped scores on the people that the map has not seen, and the threshold that stands for the
        map; None where fewer than 10 impostors of the half that the map was fitted on are above, or below, the deployed
        threshold."""
        if score_map is None or not self.claimed:
            return None
        return {**self.read(score_map(scores), "held out"), "threshold": score_map.threshold(self.threshold)}


def read_cohorts(path, subjects, separator=None):
    """`(names, group int [S])` from lines of `subject group`, also with commas and a header; subjects int64 [S], or
    names of people with a separator, a tab.

    The group of a subject without a line is −1; lines of other subjects are ignored. EvalError for any other line.
    """
    expected = "`folder<TAB>group`" if separator else "`subject group`"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", error)
        raise EvalError(f"{path}: cannot be read ({why}); --cohorts takes lines of {expected}") from None
    group_of = {}
    for number, line in enumerate(lines, 1):
        fields = line.split(separator, 1) if separator else line.replace(",", " ").split(maxsplit=1)
        known = separator or not fields or is_number(fields[0])
        if not line.strip() or not fields or (number == 1 and not known):
            continue
        if len(fields) < 2 or not known:
            raise EvalError(f"{path} line {number}: expected {expected}, found {line.strip()[:80]!r}; correct it")
        subject, group = fields[0] if separator else int(fields[0]), fields[1].strip()
        if group_of.setdefault(subject, group) != group:
            raise EvalError(
                f"{path} line {number}: subject {subject} is in {group!r} here and in {group_of[subject]!r} above; "
                "correct one of the lines"
            )
    if not group_of:
        raise EvalError(f"{path}: is empty; --cohorts takes a line {expected} for each person")
    known = {subject: group_of[subject] for subject in subjects.tolist() if subject in group_of}
    if not known:
        raise EvalError(
            f"{path}: none of its {len(group_of)} subjects is evaluated; use the csv files' SUBJECT_ID, "
            "or the names of the folders"
        )
    number_of = {name: number for number, name in enumerate(sorted(set(known.values())))}
    return list(number_of), np.array([number_of.get(known.get(subject), -1) for subject in subjects.tolist()])
