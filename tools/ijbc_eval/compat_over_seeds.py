"""Summarise compatibility reports of the same models, trained with different seeds.

    python tools/ijbc_eval/compat_over_seeds.py demo/seed*/comparison/report.json --out demo/comparison.md

The reports are the report.json files of compat_report.py. Each figure is the mean over the reports with the lowest and
highest value in brackets; a single report's figures are shown as they are. The tables are printed as well, and written
as csv beside the Markdown file, a line a figure.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from core.config import expand
from core.errors import report_errors
from tools.ijbc_eval.compat_csv import csv_text
from tools.ijbc_eval.files import EvalError, writing

COMPATIBLE, VERDICTS = "compatible", ("yes", "undecided", "no")
TABLES = {  # what is said above a table: its columns
    "1:1 TPR at FPR {fpr:g} and 1:N TPIR at FPIR {fpir:g}, in %:": ("self 1:1", "self 1:N", "cross 1:1", "cross 1:N"),
    "Compatible: in how many reports M(new, old) > M(old, old), in 1:1 and in 1:N, by the 95 % intervals.\n"
    "Update gain: (M(new, old) − M(old, old)) / (M(independent, independent) − M(old, old)):": (
        COMPATIBLE,
        "update gain 1:1",
        "update gain 1:N",
    ),
    "FMR at the deployed threshold, as a multiple of old/old's; mapped: on the people held out:": (
        "new/old",
        "new/old mapped",
        "new/new",
        "new/new mapped",
    ),
    "Area under the refresh curve, order {order}, and negative flips at rank 1, in %:": (
        "plain",
        "calibrated",
        "merged",
        "flips new/old",
        "flips new/new",
    ),
}


def read(paths):
    """The reports as `(data, {model: {column: value}})`, values None where undefined.

    EvalError unless all have the same models at the same operating points.
    """
    reports, first = [], None
    for path in paths:
        try:
            report = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            curves = report["new"][0]["refresh"]  # none without a gallery
            data = report["data"] | {"order": curves[0]["order"] if curves else "none"}
            parts = [*report["new"], *([report["independent"]] if "independent" in report else [])]
            found = {"old model": accuracies(report["old"])}
            found |= {part["name"]: figures(part, report["old"], data["order"]) for part in parts}
            point = f"{data['subset']} at FPR {data['fpr']:g} and FPIR {data['fpir']:g}, order {data['order']}"
            content = f"{point} of {', '.join(list(found)[1:])}"
        except FileNotFoundError:
            raise EvalError(f"{path}: no such file; run compat_report.py --out DIR to write DIR/report.json") from None
        except (ValueError, KeyError, TypeError, IndexError) as error:
            what = f"{type(error).__name__}: {error}"
            raise EvalError(f"{path}: not a report.json of compat_report.py ({what}); run that again") from None
        first = first or content
        if content != first:
            raise EvalError(f"{path}: {content}, but {paths[0]}: {first}; give reports of the same models")
        reports.append((data, found))
    return reports


def accuracies(part):
    """1:1 and 1:N of a model's tests, in %."""
    return {
        f"{test} {name}": _scaled(part[test][key], 100)
        for test in ("self", "cross")
        for name, key in (("1:1", "tpr"), ("1:N", "tpir"))
        if key in part.get(test, {})
    }


def figures(part, old, order):
    """The figures of a model, by the columns of TABLES."""
    found = accuracies(part)
    if COMPATIBLE in part:
        if part[COMPATIBLE] not in VERDICTS:
            raise ValueError(f"{COMPATIBLE} = {part[COMPATIBLE]}")
        found[COMPATIBLE] = part[COMPATIBLE]
        gain = part["update_gain"]
        found |= {f"update gain {name}": gain[key] for name, key in (("1:1", "tpr"), ("1:N", "tpir")) if key in gain}
    for test, name in (("cross", "new/old"), ("self", "new/new")):
        for end, deployed in (("", "self"), ("_mapped", "self_held_out")):
            if test + end in part["thresholds"]:
                rates, base = part["thresholds"][test + end], old["thresholds"][deployed]["fmr"]
                found[name + end.replace("_", " ")] = rates["fmr"] / base if rates and base else None
        if test in part["flips"]:
            found[f"flips {name}"] = _scaled(part["flips"][test]["rank1"]["rate"], 100)
    return found | {curve["way"]: _scaled(curve["area"], 100) for curve in part["refresh"] if curve["order"] == order}


def _scaled(value, factor):
    return None if value is None else factor * value


def cell(column, values):
    """A figure over the reports: `mean (lowest to highest)`, "–" if one of them is undefined; or how many say what."""
    if column == COMPATIBLE:
        counts = {said: values.count(said) for said in VERDICTS}
        return ", ".join(f"{count} {said}" for said, count in counts.items() if count)
    if None in values:
        return "–"
    places = 1 if column in (*next(iter(TABLES.values())), *list(TABLES.values())[-1]) else 2
    mean, low, high = (f"{value:.{places}f}" for value in (sum(values) / len(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})" if min(values) < 0 else f"{mean} ({low}–{high})"


def rows(reports, columns):
    """Rows of text, one per model that has one of the columns."""
    table = []
    for name, first in reports[0][1].items():
        if not first.keys().isdisjoint(columns):
            runs = [found[name] for _, found in reports]
            cells = [cell(column, [run[column] for run in runs]) if column in first else "" for column in columns]
            table.append([name, *cells])
    return table


def markdown(reports):
    """The tables with a legend each, their columns padded for the terminal."""
    data = reports[0][0]
    over = f"; mean (lowest to highest) of {len(reports)} seeds" if len(reports) > 1 else ""
    lines = [f"{data['subset']}{over}.", ""]
    known = {column for _, found in reports for part in found.values() for column in part}
    for legend, columns in TABLES.items():
        columns = [column for column in columns if column in known]
        if not columns:
            continue
        table = [["model", *columns], *rows(reports, columns)]
        widths = [max(map(len, column)) for column in zip(*table)]
        shown = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table]
        shown.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        lines += [legend.format(**data), "", *shown, ""]
    return "\n".join(lines)


def as_csv(reports):
    """A line a figure: model, figure, mean, lowest and highest value; of `compatible`, how many say what."""
    lines = [("model", "figure", "mean", "low", "high")]
    for name, first in reports[0][1].items():
        for column in first:
            values = [found[name][column] for _, found in reports]
            if column == COMPATIBLE:
                lines.append((name, column, cell(column, values), "", ""))
            elif None not in values:
                lines.append((name, column, sum(values) / len(values), float(min(values)), float(max(values))))
    return csv_text(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", metavar="report.json", help="one per seed, of the same models")
    parser.add_argument("--out", type=expand, required=True, metavar="FILE.md", help="where to write the tables")
    arguments = parser.parse_args(argv)
    reports = read(arguments.reports)
    text = markdown(reports)
    for path, content in ((arguments.out, text), (arguments.out.with_suffix(".csv"), as_csv(reports))):
        with writing(path) as file:
            file.write(content.encode())
    print(f"{text}\ntable: {arguments.out}")


if __name__ == "__main__":
    with report_errors():
        main()
