"""The pictures of a compatibility report, as PNG and PDF, at most 1,600 pixels wide and readable without colour."""

import numpy as np

from tools.ijbc_eval import compat_text
from tools.ijbc_eval.plots import COLOURS, LINES, plt, save, wrapped

_WIDTH = 9.5  # inches
_REFERENCES = (("old", "--"), ("independent", ":"))
_TESTS = (("cross", "cross-test", "o", COLOURS[0], COLOURS[0]), ("self", "new self-test", "s", COLOURS[1], "white"))
_WAYS = {"plain": (COLOURS[0], "o"), "calibrated": (COLOURS[2], "^"), "merged": (COLOURS[1], "s")}


def plot_all(report, folder):
    plot_models(report, folder / "models.png")
    if "genuine_pairs" in report["data"]:
        plot_thresholds(report, folder / "thresholds.png")
    if "gallery_templates" in report["data"]:
        plot_backfill(report, folder / "backfill.png")


def plot_models(report, path):
    """Cross- and self-test of each new model with intervals, 1:1 above 1:N, and the old self-test as a line."""
    models, panels = report["new"], compat_text.operating_points(report)
    place = np.arange(len(models))
    size = _WIDTH, len(panels) * (1.3 + 0.42 * len(models))
    figure, column = plt.subplots(len(panels), 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axes, (key, title) in zip(column[:, 0], panels.items()):
        for test, label, marker, colour, face in _TESTS:
            for row, model in zip(place + (0.14 if test == "self" else -0.14), models):
                value, bounds = model[test][key], model[test].get("interval", {}).get(key)
                if value is None:
                    continue
                if bounds:
                    axes.plot([100 * bound for bound in bounds], [row, row], color=colour, linewidth=1.6)
                axes.plot(100 * value, row, marker, color=colour, markerfacecolor=face, clip_on=False)
                text = f"{100 * value:.1f}" + f"  {label}" * (model is models[0])
                end = 100 * max([value, *(bounds or [])])
                # A white box, so that reference lines do not cross the figure out.
                look = {"va": "center", "fontsize": 8, "bbox": {"fc": "white", "ec": "none", "pad": 0.8}}
                axes.annotate(text, (end, row), (6, 0), textcoords="offset points", **look)
        for role, line in _REFERENCES:
            if role in report and report[role]["self"][key] is not None:
                value = 100 * report[role]["self"][key]
                axes.axvline(value, color="black", linestyle=line, linewidth=1.2)
                where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
                side = "right" if role == "old" else "left"
                axes.annotate(f"{role} self-test\n{value:.1f}", (value, 1), (0, 3), **where, ha=side, fontsize=8)
        axes.set_title(f"{title}, %", loc="left", fontsize=10, pad=27)  # above the names of the lines
        axes.set(ylim=(len(models) - 0.5, -0.5), xlim=(0, 104))
        axes.set_yticks(place, [wrapped(model["name"], 24) for model in models], fontsize=9)
        axes.grid(True, axis="x", alpha=0.35)
        axes.set_axisbelow(True)
    return save(figure, path)


def plot_thresholds(report, path):
    """FMR and FNMR over the threshold, a row a model: scores as they are, and mapped on the people held out."""
    data, old, models = report["data"], report["old"]["thresholds"], compat_text.models(report)
    size = _WIDTH, 0.8 + 2.1 * len(models)
    figure, rows = plt.subplots(
        len(models), 2, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    grid, left = np.array(data["grid"]), 1.0
    for model, pair in zip(models, rows):
        mine = model["thresholds"]
        panels = {
            "as they are": (old["self"], mine.get("cross"), mine["self"]),
            "mapped, people held out": (old["self_held_out"], mine.get("cross_mapped"), mine["self_mapped"]),
        }
        for axes, (title, tests) in zip(pair, panels.items()):
            for label, rates, colour, line in zip(("old/old", "new/old", "new/new"), tests, ("black", *COLOURS), LINES):
                look = {"color": colour, "linestyle": line, "linewidth": 1.4}
                for kind, values in (rates["curves"] if rates else {}).items():  # no rates where nothing is claimed
                    values = np.array(values)
                    axes.plot(
                        grid, np.where(values > 0, values, np.nan), **look, label=label if kind == "fmr" else None
                    )
                    if kind == "fmr":
                        left = min(left, grid[np.argmax(values < 0.9)])
            axes.axvline(data["threshold"], color="black", linewidth=0.8)
            axes.set_title(f"{wrapped(model['name'], 40)}, {title}", loc="left", fontsize=9)
            axes.set(yscale="log", ylim=(0.5 / data["impostor_pairs"], 1.5))
            axes.minorticks_off()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(True, alpha=0.35)
        pair[0].set_ylabel("FMR, FNMR", fontsize=9)
    for axes in rows[-1]:
        axes.set_xlabel("threshold: FMR falls with it, FNMR rises", fontsize=9)
        axes.set_xlim(left, 1)
    handles = rows[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False, handlelength=3)
    return save(figure, path)


def plot_backfill(report, path):
    """TPIR over the share of the gallery re-embedded, a panel a model, a line an order and a way to search."""
    data, models = report["data"], compat_text.models(report)
    columns = 2 if len(models) == 4 else min(3, len(models))
    lines = -(-len(models) // columns)
    size = _WIDTH, 1.2 + 2.5 * lines
    figure, panels = plt.subplots(
        lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    orders = list(dict.fromkeys(curve["order"] for model in models for curve in model["refresh"]))
    handles = {}
    for axes, model in zip(panels.flat, models):
        for curve in model["refresh"]:
            colour, marker = _WAYS[curve["way"]]
            look = {"color": colour, "marker": marker, "linestyle": LINES[orders.index(curve["order"]) % len(LINES)]}
            values = [np.nan if value is None else 100 * value for value in curve["tpir"]]
            [drawn] = axes.plot(data["percent"], values, **look, markersize=3.5, linewidth=1.2)
            handles[list(_WAYS).index(curve["way"]), orders.index(curve["order"])] = drawn
            drawn.set_label(f"{curve['way']}, {curve['order']}")
        for role, line in _REFERENCES:
            if role in report and report[role]["self"]["tpir"] is not None:
                value = 100 * report[role]["self"]["tpir"]
                handles[role] = axes.axhline(
                    value, color="black", linestyle=line, linewidth=1, label=f"{role} self-test"
                )
        axes.set_title(wrapped(model["name"], 30), fontsize=9)
        axes.grid(True, alpha=0.35)
    for axes in panels.flat[len(models) :]:
        axes.set_visible(False)
    for axes in panels.flat[max(0, len(models) - columns) : len(models)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("gallery re-embedded, %", fontsize=9)
    figure.supylabel(f"{data['subset']} 1:N TPIR at FPIR {data['fpir']:g}, %", fontsize=9)
    curves = [handles[key] for key in sorted(key for key in handles if isinstance(key, tuple))]
    shown = [*curves, *(handles[role] for role, _ in _REFERENCES if role in handles)]
    figure.legend(handles=shown, loc="outside lower center", ncols=4, fontsize=9, frameon=False, handlelength=3)
    return save(figure, path)
