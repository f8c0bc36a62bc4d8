"""The compatibility report as csv: all figures, and the maps of scores."""

import csv
import io

from tools.ijbc_eval.compat_text import AT, PAIRS, models, operating_points, threshold_rows


def as_csv(report):
    """All figures, a line each: model, test, figure, value and interval; shares, not percentages."""
    lines = [("model", "test", "figure", "value", "low", "high")]

    def add(model, test, figure, value, bounds=None):
        lines.append((model, test, figure, value, *(bounds or (None, None))))

    for model in [report["old"], *models(report)]:
        name = model["name"]
        for test in ("cross", "self"):
            for figure in ("tpr", "tpir", "top1", "top5", "mixed_top1", "accuracy", "auc"):
                if figure in model.get(test, {}):
                    add(name, f"{test}-test", figure, model[test][figure], model[test].get("interval", {}).get(figure))
        for figure in operating_points(report) if "difference" in model else ():
            apart = model["difference"]
            add(name, "cross-test", f"{figure} minus old", apart[figure], apart["interval"].get(figure))
            add(name, "cross-test", f"{figure} better than old", model["criterion"][figure])
            add(name, "cross-test", f"{figure} update gain", model["update_gain"][figure])
        for curve in model.get("refresh", ()):
            add(name, f"refresh, {curve['order']}, {curve['way']}", "area", curve["area"])
        for test, both in model.get("flips", {}).items():
            for at, found in both.items():
                where = f"negative flips at {AT[at].format(**report['data'])}"
                add(name, f"{test}-test", where, found["rate"], found["interval"])
                add(name, f"{test}-test", f"relative {where}", found["relative"])
    for name, test, pairs, rates in threshold_rows(report):
        for group, one in {"": rates, **(rates or {}).get("cohorts", {})}.items() if rates else ():
            for figure in ("fmr", "fnmr"):
                where = f"{test}, {pairs} pairs" + (f", {group}" if group else "")
                add(name, where, figure, one[figure], one["interval"][figure])
    return csv_text(lines)


def maps_as_csv(maps):
    """The score maps, [(model, test, ScoreMap or None)], a line a knot."""
    lines = [("model", "test", "fmr", "score", "mapped")]
    for name, test, found in maps:
        for knot in zip(found.fmr, found.score, found.mapped) if found else ():
            lines.append((name, PAIRS[test], *map(float, knot)))
    return csv_text(lines)


def csv_text(lines):
    """Rows as csv, floats with seven digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([f"{cell:.7g}" if isinstance(cell, float) else cell for cell in line] for line in lines)
    return text.getvalue()
