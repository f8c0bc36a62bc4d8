"""What a compatibility report measures: the old model once, then each new one against it."""

import dataclasses

import numpy as np

from tools.ijbc_eval import flips, metrics, refresh
from tools.ijbc_eval.bootstrap import Bootstrap, Units, interval, verdict
from tools.ijbc_eval.metrics import mean_top, mean_tpir
from tools.ijbc_eval.roc import Roc
from tools.ijbc_eval.thresholds import Deployed, Pool

TOPS = (1, 5)
KEYS = ("tpr", "tpir")  # what the criterion compares


@dataclasses.dataclass
class Reading:
    """How all tests are read: the rates of 1:1 TPR and 1:N TPIR, the protocol, and for intervals the people drawn."""

    fpr: float
    fpir: float
    protocol: str
    pairs: Pool
    queries: Units
    bootstrap: Bootstrap | None


@dataclasses.dataclass
class Test:
    """One test, read: scores float32 [P]; a Search for each gallery; figures as a dict of floats; resampled {"tpr",
    "tpir": float64 [resamples]}, empty without intervals."""

    scores: np.ndarray
    searches: list
    figures: dict
    resampled: dict


def measure(evaluation, gallery, probes, reading):
    """The Test of template features [T, D], `gallery` of galleries and first templates of pairs, `probes` of others."""
    protocol = reading.protocol
    scores, searches = evaluation.verify_in(gallery, probes), evaluation.identify_in(gallery, probes)
    roc = Roc(scores, evaluation.pairs.label, [reading.fpr])
    figures = {
        "tpr": roc.tpr_at(reading.fpr, protocol),
        "auc": roc.auc,
        "threshold": max(float(roc.threshold_at(reading.fpr)), -1.0),  # −inf where all may pass
        **identification_figures(searches, reading),
        "tpr_at": {f"{point:g}": roc.tpr_at(point, protocol) for point in metrics.FPRS},
        "tpir_at": {f"{point:g}": mean_tpir(searches, point, protocol) for point in metrics.FPIRS},
    }
    if protocol == "published":
        rank = evaluation.identify_mixed_in(gallery, probes)
        figures |= {f"mixed_top{k}": metrics.pooled_top(rank, k) for k in TOPS}
    resampled = {}
    if reading.bootstrap and protocol == "exact":  # the estimator is that of the exact definitions
        resampled["tpr"] = reading.pairs.tpr_at(reading.fpr, scores)
        resampled["tpir"] = reading.bootstrap.tpir_at(reading.fpir, searches, reading.queries)
        figures["interval"] = {key: interval(values) for key, values in resampled.items()}
    return Test(scores, searches, figures, resampled)


def identification_figures(searches, reading):
    tops = {f"top{k}": mean_top(searches, k, reading.protocol) for k in TOPS}
    return {"tpir": mean_tpir(searches, reading.fpir, reading.protocol), **tops}


def criterion(cross, base, ceiling):
    """Criterion and update gain of a cross-test against the old self-test; ceiling: the independent one's, or None."""
    found = {"criterion": {}, "difference": {"interval": {}}, "update_gain": {}}
    for key in KEYS:
        new, old = cross.figures[key], base.figures[key]
        found["difference"][key] = new - old
        found["criterion"][key] = "yes" if new > old else "no"
        if cross.resampled:
            differences = cross.resampled[key] - base.resampled[key]
            found["criterion"][key] = verdict(differences)
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
        people = evaluation.subjects
        bootstrap = Bootstrap(len(people[0]), arguments.bootstrap, arguments.seed) if arguments.bootstrap else None
        self.reading = Reading(
            arguments.fpr,
            arguments.fpir,
            arguments.protocol,
            Pool.of_all(evaluation.pairs, people[1], bootstrap),
            Units.of_queries(people[1][evaluation.probes.template]),
            bootstrap,
        )
        self.evaluation, self.old, self.orders = evaluation, evaluation.templates(old), orders
        self.base = measure(evaluation, self.old, self.old, self.reading)
        threshold = self.base.figures["threshold"] if arguments.threshold is None else arguments.threshold
        scores = self.base.scores
        self.deployed = Deployed(self.reading.pairs, len(people[0]), scores, threshold, cohorts, arguments.seed)
        self.right = flips.answered(self.base.searches, arguments.fpir, arguments.protocol)
        self.lost, self.maps = [], []  # rows of the csv of flips; (name, test, ScoreMap)

    def of_old(self):
        pools = {"self": "all", "self_held_out": "held out"}
        return {
            "width": self.old.shape[1],
            "self": self.base.figures,
            "thresholds": {test: self.deployed.read(self.base.scores, pool) for test, pool in pools.items()},
        }

    def assess(self, name, query, new):
        """All of a new model but the criterion: `(part of the report, cross Test or None, self Test)`.

        new [T, D]: its template features; query [T, D]: those that search old galleries, or None.
        """
        part, maps, tests = {"width": new.shape[1], "thresholds": {}, "flips": {}}, {}, {}
        part["query_width"] = None if query is None else query.shape[1]
        for test, gallery, probes in (("cross", self.old, query), ("self", new, new)):
            if probes is None:
                continue
            tests[test] = one = measure(self.evaluation, gallery, probes, self.reading)
            maps[test] = self.deployed.fit(one.scores)
            part[test] = one.figures
            part["thresholds"] |= {
                test: self.deployed.read(one.scores),
                f"{test}_mapped": self.deployed.read_mapped(one.scores, maps[test]),
            }
            part["flips"][test] = self._flips(name, test, one)
            self.maps.append((name, test, maps[test]))
        part["refresh"] = self._refresh(query, new, maps)
        return part, tests.get("cross"), tests["self"]

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
        found = refresh.searches(self.evaluation, self.old, query, new, maps.get("cross"), maps["self"], self.orders)
        curves = []
        for (order, way), steps in found.items():
            figures = [identification_figures(searches, self.reading) for searches in steps]
            curve = {key: [step[key] for step in figures] for key in ("tpir", "top1")}
            curves.append({"order": order, "way": way, "area": refresh.area(curve["tpir"]), **curve})
        return curves
