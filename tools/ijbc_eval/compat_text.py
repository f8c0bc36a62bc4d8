"""The compatibility report as text: for the terminal, as Markdown."""

import itertools
import math
import textwrap

from prettytable import PrettyTable

from losses import part_compared
from tools.ijbc_eval.bootstrap import FEWEST, FEWEST_PEOPLE, PERCENT
from tools.ijbc_eval.plots import wrapped
from tools.ijbc_eval.results import in_no_gallery

_MEANS = {
    "exact": "1:N figures are means over the galleries.",
    "published": "TPIR is the mean over the galleries; top-1 is the hits in both galleries over all probes, mixed "
    "top-1 the hits in both galleries merged into one.",
}
POINTS = {"tpr": "1:1 TPR at FPR {fpr:g}", "tpir": "1:N TPIR at FPIR {fpir:g}"}  # what the criterion compares
_COLUMNS = {
    "tpr": "1:1 TPR",
    "tpir": "1:N TPIR",
    "top1": "top-1",
    "mixed_top1": "mixed top-1",
    "accuracy": "ten-fold",
    "auc": "AUC",
}
PAIRS = {"self": "new/new", "cross": "new/old"}  # query/gallery
AT = {"rank1": "rank 1", "fpir": "FPIR {fpir:g}"}


def models(report):
    """The parts of the new models, then that of the independent one if there is one."""
    return [*report["new"], *([report["independent"]] if "independent" in report else [])]


def terminal(report):
    """Table and verdicts as plain text, at most 100 columns wide."""
    header, rows = summary_rows(report)
    table = PrettyTable([header[0], *header[2:]])
    table.align = "r"
    table.align[header[0]] = "l"
    for name, group in itertools.groupby(rows, key=lambda row: row[0]):
        table.add_row([wrapped(name, 22), *[""] * (len(header) - 2)])
        tests = [[f" {test}", *cells] for _, test, *cells in group]
        for row in tests:
            table.add_row(row, divider=row is tests[-1])
    lines = [line for text in [*verdicts(report), *caveats(report)] for line in textwrap.wrap(text, 100)]
    return "\n".join([points(report), table.get_string(), *lines])


def points(report):
    """The operating points of the table, in a line above it."""
    data = report["data"]
    drawn = f"; [{PERCENT} % intervals, {data['subjects']} people]" if _has_intervals(data) else ""
    return f"{data['subset']}, in %: {', '.join(operating_points(report).values())}{drawn}"


def operating_points(report):
    """{"tpr", "tpir": what is compared there}, of those that the set has."""
    return {key: form.format(**report["data"]) for key, form in POINTS.items() if key in report["old"]["self"]}


def summary_rows(report):
    """`(header, rows of text)`: the old model, each new one in cross- and self-test, the independent one."""
    old, keys = report["old"], list(operating_points(report))
    columns = [key for key in _COLUMNS if key in old["self"]]
    header = ["model", "test", *(_COLUMNS[key] for key in columns)]
    rows = [[old["name"], "old self-test", *_figures(old["self"], columns)]]
    blank = [""] * (len(columns) - len(keys))
    for model in models(report):
        name, independent = model["name"], model is report.get("independent")
        if "cross" in model:
            rows.append([name, "cross-test", *_figures(model["cross"], columns)])
        if not independent:
            apart, gain = model["difference"], model["update_gain"]
            differences = [_with_interval(apart[key], apart["interval"].get(key), "+.2f") for key in keys]
            rows.append([name, "minus old self-test", *differences, *blank])
            rows.append([name, "better than old", *model["criterion"].values(), *blank])
            if set(gain.values()) != {None}:
                rows.append([name, "update gain", *(_number(gain[key], 2) for key in keys), *blank])
        test = "independent self-test" if independent else "new self-test"
        rows.append([name, test, *_figures(model["self"], columns)])
    return header, rows


def _figures(figures, columns):
    bounds = figures.get("interval", {})
    return [
        _number(figures[key], 5) if key == "auc" else _with_interval(figures[key], bounds.get(key)) for key in columns
    ]


def verdicts(report):
    """A sentence for each new model: compatible or not, or in which test that is undecided."""
    base, places, lines = report["old"]["self"], operating_points(report), []
    for model in report["new"]:
        name, said = model["name"], model["criterion"]
        against = " and ".join(
            f"{place} is {_percent(model['cross'][key])} % against {_percent(base[key])} %"
            for key, place in places.items()
            if said[key] == model["compatible"]
        )
        if model["compatible"] == "yes":
            lines.append(f"{name}: compatible: it searches the old gallery better than the old model does.")
        elif model["compatible"] == "no":
            lines.append(f"{name}: NOT compatible: cross-test {against} of the old model.")
        else:
            lines.append(f"{name}: undecided: cross-test {against} of the old model; more people would tell.")
        worse = [place for key, place in places.items() if not _above(model["self"][key], base[key])]
        if worse:
            lines.append(f"{name}: its self-test is no better than the old model's in {' and '.join(worse)}.")
    return lines


def caveats(report):
    """Warnings about how far the figures can be trusted."""
    data, lines = report["data"], []
    old_width = report["old"]["width"]
    for model in models(report):
        if model["query_width"] != old_width:
            compared = part_compared(model["query_width"], old_width)
            lines.append(
                f"{model['name']} has features of {model['width']} dimensions, {report['old']['name']} of {old_width}: "
                f"its queries are compared with old ones {compared}, with its own whole."
            )
    if data["protocol"] == "published":
        lines.append("Figures follow the published scripts (--protocol published), not the exact definitions.")
        if data.get("probes_in_no_gallery"):
            lines.append(in_no_gallery(data["probes_in_no_gallery"]) + ".")
    if not _has_intervals(data):
        why = "--protocol published" if data["bootstrap"] else "--bootstrap 0"
        lines.append(f"The criterion is decided by the figures alone, without intervals ({why}).")
    lines += too_few(data)
    if not data["people_known"]:
        lines.append(
            "People are known only as images that genuine pairs connect: one may count as several, so intervals are "
            "too narrow, and mapped scores are judged on people that the map may have seen."
        )
    if not data.get("threshold_claimed", True):
        lines.append(
            f"No score map at the deployed threshold: of the {data['impostors_fitted']} impostor pairs that it is "
            f"fitted on fewer than {FEWEST} are above, or below, it; mapped FMR and FNMR are left out."
        )
    if data["without_cohort"]:
        lines.append(f"{data['without_cohort']} of {data['subjects']} subjects are in no cohort.")
    lines += stored_lines(report["stored"]) if "stored" in report else []
    if report["bad_images"]:
        lines.append(f"{len(report['bad_images'])} unusable images were left out; report.json names them.")
    return lines


def too_few(data):
    """A warning for each operating point that the lists do not resolve."""
    lines, exact = [], data["protocol"] == "exact"
    for count, what, name, first in (
        ("impostor_pairs", "impostor pairs", "fpr", 1),
        ("non_mated_probes", "non-mated probes", "fpir", 1 if exact else 2),  # one fewer than the rate says may pass
    ):
        if data.get(count, math.inf) * data[name] < first:
            none = ": not a single error is allowed there" if exact or name == "fpir" else ""
            lines.append(f"{data[count]} {what} are too few to resolve {name.upper()} {data[name]:g}{none}.")
    for key, who in (("tpr", "genuine pairs"), ("tpir", "mated probes")):
        people = data.get("rests_on", {}).get(key, {}).get("people", FEWEST_PEOPLE)
        if people < FEWEST_PEOPLE:
            lines.append(f"{people} people with {who} are too few for a yes or no, which needs {FEWEST_PEOPLE}.")
    return lines


def stored_lines(stored):
    """What the old side's features lost by rounding."""
    lost = []
    for test, apart in stored["minus_float32"].items():
        shown = [f"{_COLUMNS[key]} {_with_interval(value, None, '+.2f')}" for key, value in apart.items()]
        lost.append(f"{test} {', '.join(shown)}")
    return [
        f"{stored['file']} is {stored['kind']}: cosine to float32 {stored['mean']:.6f} in the mean, "
        f"{stored['lowest']:.6f} at worst; minus what float32 gives: {'; '.join(lost)}."
    ]


def _has_intervals(data):
    return data["bootstrap"] > 0 and data["protocol"] == "exact"


def markdown(report):
    """The text of report.md, with the plots beside it."""
    header, rows = summary_rows(report)
    data, means = report["data"], _MEANS[report["data"]["protocol"]] if "gallery_templates" in report["data"] else ""
    both = "; it must be yes in 1:1 and in 1:N" if len(operating_points(report)) > 1 else ""
    lines = [
        f"# Compatibility with {report['old']['name']}, {data['subset']}",
        "",
        *(f"- {line}" for line in [*verdicts(report), *caveats(report)]),
        "",
        f"{points(report)}:",
        "",
        markdown_table(header, rows),
        "",
        "A cross-test searches the old model's gallery with the new model's queries; a self-test uses one model for "
        f"both. Better than old: yes or no if the interval of the difference says so, else undecided{both}. Update "
        "gain: (M(new,old) − M(old,old)) / (M(independent,independent) − M(old,old)); it needs an independently "
        f"trained model that beats the old one. {means}".rstrip(),
        "",
        "![Self- and cross-test of each model](models.png)",
        "",
        *(_threshold_section(report) if "genuine_pairs" in data else []),
        *([*_refresh_section(report), *_flips_section(report)] if "gallery_templates" in data else []),
        "## Data",
        "",
        f"{data_sentence(data)} {input_sentence(data)}",
        "",
    ]
    return "\n".join(lines)


def data_sentence(data):
    """How much there is of everything."""
    parts = [f"{data['images']} images, {data['templates']} templates of {data['subjects']} people"]
    if "genuine_pairs" in data:
        parts.append(f"{data['genuine_pairs']} genuine and {data['impostor_pairs']} impostor pairs")
    if "gallery_templates" in data:
        galleries = ", ".join(f"{count} ({name})" for name, count in data["gallery_templates"].items())
        parts.append(
            f"{data['probe_templates']} probe templates (at least {data['non_mated_probes']} of them non-mated in each "
            f"gallery), galleries of {galleries} templates"
        )
    return f"{data['subset']}: {', '.join(parts)}."


def input_sentence(data):
    """What the models were fed with."""
    models = {}
    for name, fed in data["preprocessing"].items():
        models.setdefault("stored features" if fed == "stored" else f"{fed} of pixels x", []).append(name)
    parts = [f"{fed} ({', '.join(names)})" for fed, names in models.items()]
    return f"Input: {'; '.join(parts)}."


def threshold_rows(report):
    """`(model, test, pairs, rates)` at the deployed threshold, rates as in thresholds.Pool or None where unclaimed."""
    old = report["old"]
    found = [
        (old["name"], "old/old", which, old["thresholds"][key])
        for key, which in _OLD_POOLS.items()
        if key in old["thresholds"]
    ]
    for model in models(report):
        for key, rates in model["thresholds"].items():
            test = PAIRS[key.removesuffix("_mapped")]
            mapped = key.endswith("_mapped")
            found.append((model["name"], test + ", mapped" * mapped, "held out" if mapped else "all", rates))
    return found


_OLD_POOLS = {"self": "all", "self_held_out": "held out"}


def _threshold_section(report):
    data, rows, groups = report["data"], [], []
    for name, test, pairs, rates in threshold_rows(report):
        at = rates.get("threshold", data["threshold"]) if rates else None
        rows.append([name, test, pairs, _number(at, 4), *_rates(rates)])
        for group, one in (rates or {}).get("cohorts", {}).items():
            groups.append([group, name, test, pairs, *_rates(one)])
    whence = "--threshold" if data["threshold_given"] else f"that of FPR {data['fpr']:g} on old/old"
    lines = [
        "## The deployed threshold",
        "",
        f"The old system accepts a score above {data['threshold']:.4f} ({whence}). FMR: impostor pairs accepted; FNMR: "
        "genuine pairs refused; tests are query/gallery. Mapped: each score s becomes F_oo⁻¹(F(s)), F and F_oo the "
        "distributions of the test's and of old/old's impostor scores (calibration.csv), or, the same, the threshold "
        f"becomes the one in the table. Maps are fitted on the {data['impostors_fitted']} impostor pairs of one half "
        f"of the people and judged on the {data['impostors_held_out']} impostor and {data['genuine_held_out']} genuine "
        f"pairs of the other, held out. No interval for fewer than {FEWEST} errors.",
        "",
        markdown_table(["model", "test", "pairs", "threshold", "FMR", "FNMR %"], rows),
        "",
        "![FMR and FNMR over the threshold, as they are and mapped](thresholds.png)",
        "",
    ]
    if groups:
        lines += [
            "By cohort, at the same threshold; both people of a pair are of the cohort:",
            "",
            markdown_table(["cohort", "model", "test", "pairs", "FMR", "FNMR %"], groups),
            "",
        ]
    return lines


def _rates(rates):
    if rates is None:
        return ["–", "–"]
    intervals = rates["interval"]
    return [_with_interval(rates["fmr"], intervals["fmr"], ".3g", 1), _with_interval(rates["fnmr"], intervals["fnmr"])]


def _refresh_section(report):
    data, rows = report["data"], []
    for model in models(report):
        for curve in model["refresh"]:
            known = [value for value in curve["tpir"] if value is not None]
            shown = [_percent(curve["area"]), _percent(min(known, default=None))]
            way = curve["way"] + "*" * curve["beyond_map"]
            rows.append([model["name"], curve["order"], way, *shown, *map(_percent, curve["tpir"])])
    starred = any(curve["beyond_map"] for model in models(report) for curve in model["refresh"])
    return [
        "## While the gallery is re-embedded",
        "",
        f"TPIR in % at FPIR {data['fpir']:g} with a growing share of the gallery re-embedded; area: its mean over the "
        f"whole refresh. Orders: random (seed {data['seed']}), dispersion (templates whose images differ most first), "
        "or a file's. Plain: the new query on everything, so 0 % is the cross-test and 100 % the new self-test; "
        "calibrated: the same with both kinds of scores mapped as above; merged: the old query on the old part, the "
        "new query on the new part, mapped. Maps are fitted on half of these people."
        + ("" if "genuine_pairs" in data else " Maps need pairs: here plain alone.")
        + (f" *: the threshold of the FPIR is above a map's last knot, {FEWEST} impostors: a guess." * starred),
        "",
        markdown_table(
            ["model", "order", "search", "area", "lowest", *(f"{percent} %" for percent in data["percent"])], rows
        ),
        "",
        "![TPIR over the re-embedded share of the gallery](backfill.png)",
        "",
    ]


def _flips_section(report):
    rows = [
        [
            model["name"],
            PAIRS[test],
            AT[at].format(**report["data"]),
            str(found["flips"]),
            _with_interval(found["rate"], found["interval"]),
            _number(found["relative"], 2),
        ]
        for model in models(report)
        for test, both in model["flips"].items()
        for at, found in both.items()
    ]
    queries = report["new"][0]["flips"]["self"]["rank1"]["queries"]
    return [
        "## Who loses",
        "",
        f"Negative flips: of {queries} mated queries those that the old model answers right and the new one wrong, at "
        "rank 1 and above each test's own threshold at the FPIR. Relative: the rate over (1 − err_old) · err_new, 1 if "
        f"the new model's errors have nothing to do with the old one's. No interval for fewer than {FEWEST} flips.",
        "",
        markdown_table(["model", "test", "at", "flips", "rate %", "relative"], rows),
        "",
    ]


def markdown_table(header, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def _with_interval(value, bounds, places=".2f", factor=100):
    """`value [low, high]`, in % unless another factor is given."""
    if value is None:
        return "–"
    shown = format(factor * value, places)
    return shown + (" [{}, {}]".format(*(format(factor * bound, places) for bound in bounds)) if bounds else "")


def _percent(value):
    return "–" if value is None else f"{100 * value:.2f}"


def _number(value, places):
    return "–" if value is None else f"{value:.{places}f}"


def _above(value, other):
    return value is not None and other is not None and value > other
