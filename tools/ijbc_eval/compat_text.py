"""The compatibility report as text, for the terminal and as Markdown."""

from prettytable import PrettyTable

from tools.ijbc_eval.results import in_no_gallery

_MEANS = {
    "exact": "1:N figures are means over the galleries.",
    "published": "TPIR is the mean over the galleries; top-1 is the hits in both galleries over all probes, mixed "
    "top-1 the hits in both galleries merged into one.",
}


def terminal(report):
    """Table and verdicts as plain text."""
    header, rows = summary_rows(report)
    table = PrettyTable(header)
    table.align[header[0]] = table.align[header[1]] = "l"
    table.add_rows(rows)
    return "\n".join([table.get_string(), *verdicts(report), *caveats(report)])


def summary_rows(report):
    """`(header, rows of text)`: the old model, each new one in cross- and self-test, the independent one."""
    data = report["data"]
    header = [
        "model",
        "test",
        f"1:1 TPR % at FPR {data['fpr']:g}",
        "AUC",
        "1:N top-1 %",
        *(["mixed top-1 %"] if data["protocol"] == "published" else []),
        f"TPIR % at FPIR {data['fpir']:g}",
        "M(new,old) > M(old,old)",
        "update gain 1:1 / 1:N",
    ]
    rows = [_row(report["old"]["name"], "old self-test", report["old"]["self"])]
    for model in report["new"]:
        gain = " / ".join(_number(model["update_gain"][key], 2) for key in ("tpr", "tpir"))
        holds = "{} ({} / {})".format(*(_yes(flag) for flag in (model["compatible"], *model["criterion"].values())))
        rows.append(_row(model["name"], "cross-test", model["cross"], holds, gain))
        rows.append(_row(model["name"], "new self-test", model["self"]))
    if "independent" in report:
        for test in ("cross", "self"):
            if test in report["independent"]:
                figures = report["independent"][test]
                rows.append(_row(report["independent"]["name"], f"independent {test}-test", figures))
    return header, rows


def _row(name, test, figures, holds="", gain=""):
    shown = [_percent(figures[key]) for key in ("tpr", "top1", "mixed_top1", "tpir") if key in figures]
    return [name, test, shown[0], _number(figures["auc"], 5), *shown[1:], holds, gain]


def verdicts(report):
    """A sentence for each new model: compatible or not, and in which test it fails."""
    data, base, lines = report["data"], report["old"]["self"], []
    places = {"tpr": f"1:1 TPR at FPR {data['fpr']:g}", "tpir": f"1:N TPIR at FPIR {data['fpir']:g}"}
    for model in report["new"]:
        if model["compatible"]:
            lines.append(f"{model['name']}: compatible: it searches the old gallery better than the old model does.")
        else:
            short = [
                f"{place} is {_percent(model['cross'][key])} % against {_percent(base[key])} %"
                for key, place in places.items()
                if not model["criterion"][key]
            ]
            lines.append(f"{model['name']}: NOT compatible: cross-test {' and '.join(short)} of the old model.")
        worse = [place for key, place in places.items() if not _above(model["self"][key], base[key])]
        if worse:
            lines.append(f"{model['name']}: its self-test is no better than the old model's in {' and '.join(worse)}.")
    return lines


def caveats(report):
    """Warnings about how far the figures can be trusted."""
    data, lines = report["data"], []
    if data["protocol"] == "published":
        lines.append("Figures follow the published scripts (--protocol published), not the exact definitions.")
        if data["probes_in_no_gallery"]:
            lines.append(in_no_gallery(data["probes_in_no_gallery"]) + ".")
    for count, name in (("impostor_pairs", "fpr"), ("non_mated_probes", "fpir")):
        if data[count] * data[name] < 1:
            what = f"{data[count]} {count.replace('_', ' ')}"
            none = ": not a single error is allowed there" if data["protocol"] == "exact" else ""
            lines.append(f"{what} are too few to resolve {name.upper()} {data[name]:g}{none}.")
    if report["bad_images"]:
        lines.append(f"{len(report['bad_images'])} unusable images were left out; report.json names them.")
    return lines


def markdown(report):
    """The text of report.md, with the plots beside it."""
    header, rows = summary_rows(report)
    data = report["data"]
    galleries = ", ".join(f"{count} ({name})" for name, count in data["gallery_templates"].items())
    lines = [
        f"# Compatibility with {report['old']['name']}, {data['subset']}",
        "",
        *(f"- {line}" for line in [*verdicts(report), *caveats(report)]),
        "",
        _table(header, rows),
        "",
        "A cross-test searches the old model's gallery with the new model's queries; a self-test uses one model for "
        "both. The criterion must hold in 1:1 and in 1:N (each in brackets). Update gain: (M(new,old) − M(old,old)) / "
        "(M(independent,independent) − M(old,old)); it needs an independently trained model that beats the old one. "
        + _MEANS[data["protocol"]],
        "",
        "![Self- and cross-test of each model](models.png)",
        "",
        "## Backfill",
        "",
        f"TPIR in % at FPIR {data['fpir']:g}, queries by the new model, with a growing share of the gallery "
        f"re-embedded by it (order: {data['backfill_order']}). 0 % is the cross-test, 100 % the new self-test.",
        "",
        _table(
            ["re-embedded %", *map(str, report["new"][0]["backfill"]["percent"])],
            [[model["name"], *map(_percent, model["backfill"]["tpir"])] for model in report["new"]],
        ),
        "",
        "![TPIR over the re-embedded share of the gallery](backfill.png)",
        "",
        "## Data",
        "",
        f"{data['subset']}: {data['images']} images, {data['templates']} templates, {data['genuine_pairs']} genuine "
        f"and {data['impostor_pairs']} impostor pairs, {data['probe_templates']} probe templates (at least "
        f"{data['non_mated_probes']} of them non-mated in each gallery), galleries of {galleries} templates.",
        "",
    ]
    return "\n".join(lines)


def _table(header, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def _percent(value):
    return "–" if value is None else f"{100 * value:.2f}"


def _number(value, places):
    return "–" if value is None else f"{value:.{places}f}"


def _yes(flag):
    return "yes" if flag else "no"


def _above(value, other):
    return value is not None and other is not None and value > other
