"""ROC, DET and identification-rate plots of result files, as PNG and PDF; needs no display."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tools.ijbc_eval.files import writing
from tools.ijbc_eval.metrics import Search, mean_tpir
from tools.ijbc_eval.roc import Roc

DPI = 130
# Distinguishable without colour and to the colour-blind (the colours are Okabe and Ito's).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "black")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_POINTS = 241  # per curve: forty per decade over six decades


def plot_verification(results, prefix):
    """Write `{prefix}_roc` and `{prefix}_det`, PNG and PDF, of 1:1 results; returns the paths of the PNG files."""
    protocol = results[0]["protocol"]  # the same in all results
    finest = min(1 / np.count_nonzero(~result["label"]) for result in results)
    fprs = np.logspace(max(-6, np.floor(np.log10(finest))), 0, _POINTS)
    lines = []
    for result in results:
        for name, scores in zip(result["names"], result["scores"]):
            roc = Roc(scores, result["label"], fprs)
            tprs = np.array([roc.tpr_at(fpr, protocol) for fpr in fprs])
            lines.append((f"{name}\nAUC {roc.auc:.4f}", tprs))
    title = f"{_subsets(results)} 1:1 verification{_reading(protocol)}"
    roc = _draw(f"{prefix}_roc.png", fprs, lines, title, "false positive rate", "true positive rate")
    misses = [(name, np.where(tprs < 1, 1 - tprs, np.nan)) for name, tprs in lines]  # a log axis has no 0
    det = _draw(f"{prefix}_det.png", fprs, misses, title + ", DET", "false positive rate", "false negative rate", True)
    return [roc, det]


def plot_identification(results, prefix):
    """Write `{prefix}_tpir`, PNG and PDF, of 1:N results, the mean over the galleries; returns [path of the PNG]."""
    lines, finest, protocol = [], 1.0, results[0]["protocol"]
    for result in results:
        finest = min(finest, 1 / max(1, np.count_nonzero(~result["label"], axis=1).max()))
    fpirs = np.logspace(max(-4, np.floor(np.log10(finest))), 0, _POINTS)
    for result in results:
        for name, scores, ranks in zip(result["names"], result["scores"], result["rank"]):
            searches = [Search(*parts) for parts in zip(result["label"], ranks, scores)]
            lines.append((str(name), np.array([mean_tpir(searches, fpir, protocol) for fpir in fpirs])))
    title = f"{_subsets(results)} 1:N identification, mean of the galleries{_reading(protocol)}"
    labels = "false positive identification rate (FPIR)", "true positive identification rate (TPIR)"
    return [_draw(f"{prefix}_tpir.png", fpirs, lines, title, *labels)]


def _subsets(results):
    return " and ".join(sorted({str(result["subset"]) for result in results}))


def _reading(protocol):
    return "" if protocol == "exact" else f", {protocol} protocol"


def _draw(path, rates, lines, title, x_label, y_label, log_y=False):
    """Curves over a logarithmic rate, each with its name at its left end, where they are furthest apart."""
    lines = [(wrapped(name, 26), values) for name, values in lines]
    left = 0.5 + 0.08 * max(len(part) for name, _ in lines for part in name.split("\n"))  # inches for names of 9 points
    figure, axes = plt.subplots(figsize=(left + 8, max(5, 1.5 + 0.4 * len(lines))))
    figure.subplots_adjust(left=left / (left + 8), right=1 - 0.9 / (left + 8), top=0.92, bottom=0.11)
    drawn = np.concatenate([values[np.isfinite(values)] for _, values in lines])
    axes.set(xscale="log", title=title, xlabel=x_label, ylabel=y_label, xlim=(rates[0], 1))
    if log_y:
        axes.set_yscale("log")
        axes.set_ylim(drawn.min() / 1.3 if len(drawn) else 0.1, 1.3 * drawn.max() if len(drawn) else 1)
    else:
        room = 0.04 * np.ptp(drawn) + 0.002
        axes.set_ylim(drawn.min() - room, drawn.max() + room)
    ends = []
    for number, (name, values) in enumerate(lines):
        look = style(number)
        axes.plot(rates, values, **look, linewidth=1.6, markersize=5, markevery=(number * 5 % 40, 40), clip_on=False)
        known = np.flatnonzero(np.isfinite(values))
        if len(known):
            ends.append((rates[known[0]], values[known[0]], name, look["color"]))
    axes.yaxis.set_label_position("right")
    axes.yaxis.tick_right()
    axes.grid(True, which="major", alpha=0.35)
    _name_ends(axes, ends)
    return save(figure, path)


def style(number):
    """Colour, line and marker of the curve `number`: no two of 196 have all three in common."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[(number + number // 7) % len(MARKERS)],
    }


def _name_ends(axes, ends):
    """Names left of the axes, one above the other in the order of the curves' ends: (x, y, name, colour)."""
    height = axes.get_window_extent().height
    to_axes = axes.transAxes.inverted()
    places = [to_axes.transform(axes.transData.transform((x, y)))[1] for x, y, *_ in ends]
    room = [(0.2 + 1.2 * (name.count("\n") + 1)) * 9 * axes.figure.dpi / 72 / height for _, _, name, _ in ends]
    for row, place in spread(places, room).items():
        x, y, name, colour = ends[row]
        axes.annotate(
            name,
            (x, y),
            (-0.05, place),
            textcoords="axes fraction",
            ha="right",
            va="center",
            fontsize=9,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "relpos": (1, 0.5), "shrinkA": 2, "shrinkB": 0},
        )


def spread(places, room):
    """{row: place}: the places 0 … 1 moved as little as needed for each to have its `room` around it; order is kept.

    Neighbours that overlap are merged into a block, centred on the mean of where its members want to be, but within
    0 … 1 unless it is larger.
    """
    blocks = []  # [rows, room of all, centre]

    def add(rows, size, centre):
        blocks.append([rows, size, min(max(centre, size / 2), max(1 - size / 2, 0.5))])

    for row in np.argsort(places, kind="stable").tolist():
        add([row], room[row], places[row])
        while len(blocks) > 1:
            (rows, size, centre), (more, added, other) = blocks[-2:]
            if centre + size / 2 <= other - added / 2:
                break
            del blocks[-2:]
            share = len(rows) / (len(rows) + len(more))
            add(rows + more, size + added, share * centre + (1 - share) * other)
    found = {}
    for rows, size, centre in blocks:
        bottom = centre - size / 2
        for row in rows:
            found[row] = bottom + room[row] / 2
            bottom += room[row]
    return found


def wrapped(name, width):
    """A long name broken into lines after underscores, or else anywhere; its own line breaks stay."""
    lines = []
    for line in name.split("\n"):
        lines.append("")
        for part in line.replace("_", "_\0").replace(" ", " \0").split("\0"):
            if lines[-1] and len((lines[-1] + part).rstrip()) > width:
                lines.append("")
            lines[-1] += part
    pieces = [line[start : start + width] for line in lines for start in range(0, max(len(line), 1), width)]
    return "\n".join(piece.rstrip() for piece in pieces)


def save(figure, path):
    """Write the figure as `path`, a PNG, and as a PDF beside it; returns the path."""
    if figure.get_layout_engine():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once for both
    undated = {"pdf": {"CreationDate": None}, "png": {}}  # the same report, the same bytes
    for ending, metadata in undated.items():
        with writing(f"{str(path).removesuffix('png')}{ending}") as file:
            figure.savefig(file, format=ending, dpi=DPI, metadata=metadata)
    plt.close(figure)
    return path
