"""Summarise compatibility reports of the same models, trained with different seeds, in one table.

    python tools/ijbc_eval/compat_over_seeds.py demo/seed*/comparison/report.json --out demo/comparison.md

The reports are the report.json files of compat_report.py. Each figure is the mean over the reports with the lowest and
highest value in brackets; a single report's figures are shown as they are. The table is printed as well.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from core.config import expand
from core.errors import report_errors
from tools.ijbc_eval.files import EvalError, writing

HEADER = ["model", "self 1:1", "self 1:N", "cross 1:1", "cross 1:N", "compatible", "update gain 1:1", "update gain 1:N"]
KEYS = ("tpr", "tpir")  # 1:1, 1:N


def read(paths):
    """The reports as dicts. Raises EvalError unless all have the same models at the same operating points."""
    reports, first = [], None
    for path in paths:
        try:
            report = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            data = report["data"]
            point = f"{data['subset']} at FPR {data['fpr']:g} and FPIR {data['fpir']:g}"
            content = f"{point} of {', '.join(name for name, _ in models(report))}"
        except FileNotFoundError:
            raise EvalError(f"{path}: no such file; run compat_report.py --out DIR to write DIR/report.json") from None
        except (ValueError, KeyError, TypeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise EvalError(f"{path}: not a report.json of compat_report.py ({what}); run that again") from None
        first = first or content
        if content != first:
            raise EvalError(f"{path}: {content}, but {paths[0]}: {first}; give reports of the same models")
        reports.append(report)
    return reports


def models(report):
    """`[(name, part of the report)]`: the old model, the new ones, the independent one."""
    parts = [*report["new"], *([report["independent"]] if "independent" in report else [])]
    return [("old model", report["old"]), *((part["name"], part) for part in parts)]


def rows(reports):
    """Rows of text, one per model, in the columns of HEADER."""
    table = []
    for runs in zip(*map(models, reports)):
        name, parts = runs[0][0], [part for _, part in runs]
        row = [name]
        for test in ("self", "cross"):
            row += [spread([part[test][key] for part in parts], 100, 1) if test in parts[0] else "" for key in KEYS]
        if "compatible" in parts[0]:
            row.append(f"{sum(part['compatible'] for part in parts)} of {len(parts)}")
            row += [spread([part["update_gain"][key] for part in parts], 1, 2) for key in KEYS]
        table.append(row + [""] * (len(HEADER) - len(row)))
    return table


def spread(values, factor, places):
    """`mean (lowest to highest)` of factor · values; "–" if one of them is undefined."""
    if None in values:
        return "–"
    figures = sum(values) / len(values), min(values), max(values)
    mean, low, high = (f"{factor * value:.{places}f}" for value in figures)
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def markdown(reports):
    """A legend and the table, its columns padded for the terminal."""
    data, table = reports[0]["data"], [HEADER, *rows(reports)]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    over = f"; mean (lowest to highest) of {len(reports)} seeds" if len(reports) > 1 else ""
    return "\n".join(
        [
            f"{data['subset']}, in %: 1:1 TPR at FPR {data['fpr']:g}, 1:N TPIR at FPIR {data['fpir']:g}{over}.",
            "Compatible: the number of seeds with M(new, old) > M(old, old) in both 1:1 and 1:N.",
            "Update gain: (M(new, old) − M(old, old)) / (M(independent, independent) − M(old, old)).",
            "",
            *lines,
            "",
        ]
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", metavar="report.json", help="one per seed, of the same models")
    parser.add_argument("--out", type=expand, required=True, metavar="FILE.md", help="where to write the table")
    arguments = parser.parse_args(argv)
    text = markdown(read(arguments.reports))
    with writing(arguments.out) as file:
        file.write(text.encode())
    print(f"{text}\ntable: {arguments.out}")


if __name__ == "__main__":
    with report_errors():
        main()
