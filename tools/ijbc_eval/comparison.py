"""What a compatibility report measures: the old model once, then each new one against it."""

import dataclasses

import numpy as np

from tools.ijbc_eval import flips, metrics, refresh
from tools.ijbc_eval.bootstrap import Bootstrap, Units, interval, verdict
from tools.ijbc_eval.metrics import mean_top, mean_tpir
from tools.ijbc_eval.roc import Roc, most_allowed
from tools.ijbc_eval.stored import cosines
from tools.ijbc_eval.thresholds import Deployed, Pool

TOPS = (1, 5)
KEYS = ("tpr", "tpir")  # what the criterion compares


@dataclasses.dataclass
class Reading:
    """How all tests are read: the rates of 1:1 TPR and 1:N TPIR, the protocol, and for intervals the people drawn.

    pairs, queries: None where there is no 1:1, no 1:N.
    """

    fpr: float
    fpir: float
    protocol: str
    pairs: Pool | None
    queries: Units | None
    bootstrap: Bootstrap | None


@dataclasses.dataclass
class Test:
    """One test, read: scores float32 [P], None without pairs; a Search for each gallery; figures as a dict of floats;
    resampled {"tpr", "tpir": float64 [resamples]} and rests_on (`resolution`), empty without intervals."""

    scores: np.ndarray | None
    searches: list
    figures: dict
    resampled: dict
    rests_on: dict = dataclasses.field(default_factory=dict)


def reading_of(evaluation, arguments):
    """The Reading that fpr, fpir, protocol, bootstrap and seed of the arguments ask for."""
    people = evaluation.subjects
    bootstrap = Bootstrap(len(people[0]), arguments.bootstrap, arguments.seed) if arguments.bootstrap else None
    return Reading(
        arguments.fpr,
        arguments.fpir,
        arguments.protocol,
        Pool.of_all(evaluation.pairs, people[1], bootstrap) if evaluation.pairs else None,
        Units.of_queries(people[1][evaluation.probes.template]) if evaluation.probes else None,
        bootstrap,
    )


def measure(evaluation, gallery, probes, reading):
    """The Test of template features [T, D], `gallery` of galleries and first templates of pairs, `probes` of others."""
    test = Test(None, [], {}, {})
    if reading.pairs:
        test.scores = evaluation.verify_in(gallery, probes)
        test.figures |= verification_figures(evaluation, test.scores, reading)
    if reading.queries:
        test.searches = evaluation.identify_in(gallery, probes)
        test.figures |= identification_figures(test.searches, reading)
        points = evaluation.set.fpirs
        test.figures["tpir_at"] = {f"{at:g}": mean_tpir(test.searches, at, reading.protocol) for at in points}
        if reading.protocol == "published":
            rank = evaluation.identify_mixed_in(gallery, probes)
            test.figures |= {f"mixed_top{k}": metrics.pooled_top(rank, k) for k in TOPS}
    if reading.bootstrap and reading.protocol == "exact":  # the estimator is that of the exact definitions
        if reading.pairs:
            test.resampled["tpr"] = reading.pairs.tpr_at(reading.fpr, test.scores)
        if reading.queries:
            test.resampled["tpir"] = reading.bootstrap.tpir_at(reading.fpir, test.searches, reading.queries)
        test.rests_on = resolution(test.searches, reading)
        test.figures["interval"] = {key: interval(values) for key, values in test.resampled.items()}
    return test


def verification_figures(evaluation, scores, reading):
    roc, protocol = Roc(scores, evaluation.pairs.label, [reading.fpr]), reading.protocol
    return {
        "tpr": roc.tpr_at(reading.fpr, protocol),
        "auc": roc.auc,
        "threshold": max(float(roc.threshold_at(reading.fpr)), -1.0),  # −inf where all may pass
        **({"accuracy": metrics.fold_accuracy(scores, evaluation.pairs.label)} if evaluation.set.folds else {}),
        "tpr_at": {f"{point:g}": roc.tpr_at(point, protocol) for point in evaluation.set.fprs},
    }


def identification_figures(searches, reading):
    tops = {f"top{k}": mean_top(searches, k, reading.protocol) for k in TOPS}
    return {"tpir": mean_tpir(searches, reading.fpir, reading.protocol), **tops}


def resolution(searches, reading):
    """What figures rest on, {"tpr", "tpir": {"people", "errors"}}, as in bootstrap.verdict."""
    found = {}
    if reading.pairs:
        rows, people = reading.pairs.rows, reading.pairs.units.first
        errors = most_allowed(reading.fpr, len(rows["fmr"]))
        found["tpr"] = {"people": len(np.unique(people[rows["fnmr"]])), "errors": errors}
    if reading.queries:
        mated = np.array([search.mated for search in searches])
        errors = most_allowed(reading.fpir, int(np.count_nonzero(~mated, axis=1).min()))
        found["tpir"] = {"people": len(np.unique(reading.queries.first[mated.any(axis=0)])), "errors": errors}
    return found


def criterion(cross, base, ceiling):
    """Criterion and update gain of a cross-test against the old self-test; ceiling: the independent one's, or None."""
    found = {"criterion": {}, "difference": {"interval": {}}, "update_gain": {}}
    for key in (key for key in KEYS if key in base.figures):
        new, old = cross.figures[key], base.figures[key]
        found["difference"][key] = new - old
        found["criterion"][key] = "yes" if new > old else "no"
        if cross.resampled:
            differences = cross.resampled[key] - base.resampled[key]
            found["criterion"][key] = verdict(differences, **cross.rests_on[key])
            found["difference"]["interval"][key] = interval(differences)
        found["update_gain"][key] = update_gain(new, old, ceiling and ceiling.figures[key])
    said = found["criterion"].values()
    found["compatible"] = "no" if "no" in said else "undecided" if "undecided" in said else "yes"
    return found


def update_gain(cross, base, ceiling):
    """BCT's update gain; None without an independent model or if that is no better than the old one."""
    return (cross - base) / (ceiling - base) if ceiling is not None and ceiling > base else None


class Comparison:
    """The old model's side of a report, against which each new model is held."""

    def __init__(self, evaluation, old, arguments, cohorts, orders):
        self.reading = reading_of(evaluation, arguments)
        self.evaluation, self.old, self.orders = evaluation, evaluation.templates(old), orders
        self.base = measure(evaluation, self.old, self.old, self.reading)
        self.deployed = self._deployed(arguments, cohorts) if self.reading.pairs else None
        self.right = flips.answered(self.base.searches, arguments.fpir, arguments.protocol)
        self.lost, self.maps = [], []  # rows of the csv of flips; (name, test, ScoreMap)

    def _deployed(self, arguments, cohorts):
        threshold = self.base.figures["threshold"] if arguments.threshold is None else arguments.threshold
        people = len(self.evaluation.subjects[0])
        return Deployed(self.reading.pairs, people, self.base.scores, threshold, cohorts, arguments.seed)

    def of_old(self):
        pools = {"self": "all", "self_held_out": "held out"} if self.deployed else {}
        return {
            "width": self.old.shape[1],
            "self": self.base.figures,
            "thresholds": {test: self.deployed.read(self.base.scores, pool) for test, pool in pools.items()},
        }

    def assess(self, name, query, new):
        """All of a new model but the criterion: `(part of the report, cross Test, self Test)`.

        new [T, D]: its template features; query [T, D']: those that search old galleries.
        """
        part = {"width": new.shape[1], "query_width": query.shape[1], "thresholds": {}, "flips": {}}
        maps, tests = {}, {}
        for test, gallery, probes in (("cross", self.old, query), ("self", new, new)):
            tests[test] = one = measure(self.evaluation, gallery, probes, self.reading)
            part[test] = one.figures
            if self.deployed:
                maps[test] = self.deployed.fit(one.scores)
                part["thresholds"] |= {
                    test: self.deployed.read(one.scores),
                    f"{test}_mapped": self.deployed.read_mapped(one.scores, maps[test]),
                }
                self.maps.append((name, test, maps[test]))
            if one.searches:
                part["flips"][test] = self._flips(name, test, one)
        part["refresh"] = self._refresh(query, new, maps)
        return part, tests["cross"], tests["self"]

    def stored(self, old, exact, news):
        """What rounding cost: `{"file", "kind", "mean", "lowest", "minus_float32": {test: {"tpr", "tpir"}}}`.

        old, exact: the old side and its float32 original; news: (name, ModelFile).
        """
        features = self.evaluation.templates(exact)
        mean, lowest = cosines(self.old, features)
        before = measure(self.evaluation, features, features, self.reading)
        lost = {"old self-test": self._difference(self.base, before)}
        for name, model in news:
            query = self.evaluation.templates(model)
            tests = (measure(self.evaluation, side, query, self.reading) for side in (self.old, features))
            lost[f"{name} cross-test"] = self._difference(*tests)
        return {"file": old.file, "kind": old.kind, "mean": mean, "lowest": lowest, "minus_float32": lost}

    @staticmethod
    def _difference(one, other):
        return {key: one.figures[key] - other.figures[key] for key in KEYS if key in one.figures}

    def _flips(self, name, test, one):
        reading, found = self.reading, {}
        right = flips.answered(one.searches, reading.fpir, reading.protocol)
        mated = np.array([search.mated for search in one.searches])
        for at, mine in right.items():
            before = self.right[at]
            found[at], lost = flips.negative_flips(before, mine, mated, reading.queries.first, reading.bootstrap)
            shown = "rank 1" if at == "rank1" else f"FPIR {reading.fpir:g}"
            self.lost += flips.rows(self.evaluation, name, f"{test}-test", shown, lost)
        return found

    def _refresh(self, query, new, maps):
        both = maps.get("cross"), maps.get("self")
        found = refresh.searches(self.evaluation, self.old, query, new, *both, self.orders)
        curves = []
        for (order, way), steps in found.items():
            figures = [identification_figures(searches, self.reading) for searches in steps]
            curve = {key: [step[key] for step in figures] for key in ("tpir", "top1")}
            curve["beyond_map"] = way != "plain" and self._beyond(steps, maps["self"].mapped[-1])
            curves.append({"order": order, "way": way, "area": refresh.area(curve["tpir"]), **curve})
        return curves

    def _beyond(self, steps, last):
        """Whether the threshold of a search is above the last knot of the maps, where they are a guess."""
        at = self.reading.fpir, self.reading.protocol
        return any(one.threshold_at(*at) > last for searches in steps for one in searches)
