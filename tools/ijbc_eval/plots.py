"""ROC, DET and identification-rate plots of result files, as PNG; needs no display."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tools.ijbc_eval.files import writing
from tools.ijbc_eval.metrics import Search, mean_tpir
from tools.ijbc_eval.roc import Roc

_POINTS = 241  # per curve: forty per decade over six decades
_BARS = ((-0.2, "cross", "cross-test", "#1f5fa8"), (0.2, "self", "new self-test", "#8fbfe8"))


def plot_verification(results, prefix):
    """Write `{prefix}_roc.png` and `{prefix}_det.png` of 1:1 results; returns the paths."""
    protocol = results[0]["protocol"]  # the same in all results
    finest = min(1 / np.count_nonzero(~result["label"]) for result in results)
    fprs = np.logspace(max(-6, np.floor(np.log10(finest))), 0, _POINTS)
    lines = []
    for result in results:
        for name, scores in zip(result["names"], result["scores"]):
            roc = Roc(scores, result["label"], fprs)
            tprs = np.array([roc.tpr_at(fpr, protocol) for fpr in fprs])
            lines.append((f"{name}  (AUC {roc.auc:.4f})", tprs))
    title = f"{_subsets(results)} 1:1 verification{_reading(protocol)}"
    roc = _draw(f"{prefix}_roc.png", fprs, lines, title, "false positive rate", "true positive rate")
    misses = [(name, np.where(tprs < 1, 1 - tprs, np.nan)) for name, tprs in lines]  # a log axis has no 0
    det = _draw(f"{prefix}_det.png", fprs, misses, title + ", DET", "false positive rate", "false negative rate", True)
    return [roc, det]


def plot_identification(results, prefix):
    """Write `{prefix}_tpir.png` of 1:N results, the mean over the galleries; returns the path in a list."""
    lines, finest, protocol = [], 1.0, results[0]["protocol"]
    for result in results:
        finest = min(finest, 1 / max(1, np.count_nonzero(~result["label"], axis=1).max()))
    fpirs = np.logspace(max(-4, np.floor(np.log10(finest))), 0, _POINTS)
    for result in results:
        for name, scores, ranks in zip(result["names"], result["scores"], result["rank"]):
            searches = [Search(*parts) for parts in zip(result["label"], ranks, scores)]
            lines.append((str(name), np.array([mean_tpir(searches, fpir, protocol) for fpir in fpirs])))
    title = f"{_subsets(results)} 1:N identification, mean of the galleries{_reading(protocol)}"
    return [
        _draw(
            f"{prefix}_tpir.png",
            fpirs,
            lines,
            title,
            "false positive identification rate (FPIR)",
            "true positive identification rate (TPIR)",
        )
    ]


def _subsets(results):
    return " and ".join(sorted({str(result["subset"]) for result in results}))


def _reading(protocol):
    return "" if protocol == "exact" else f", {protocol} protocol"


def _draw(path, rates, lines, title, x_label, y_label, log_y=False):
    figure, axes = plt.subplots(figsize=(7.5, 5 + 0.22 * len(lines)), layout="constrained")
    for name, values in lines:
        axes.plot(rates, values, label=name, linewidth=1.6)
    axes.set(xscale="log", title=title, xlabel=x_label, ylabel=y_label, xlim=(rates[0], 1))
    if log_y:
        axes.set_yscale("log")
        axes.set_ylim(top=1)
    else:
        axes.set_ylim(0, 1.01)
    axes.grid(True, which="major", alpha=0.35)
    figure.legend(loc="outside lower center", fontsize=9)
    return _save(figure, path)


def plot_models(report, path):
    """Bars of each new model's cross- and self-test, 1:1 and 1:N, beside the old self-test. report: compat_report's."""
    data = report["data"]
    panels = [("tpr", f"1:1 TPR at FPR {data['fpr']:g}"), ("tpir", f"1:N TPIR at FPIR {data['fpir']:g}")]
    names = [_wrapped(model["name"]) for model in report["new"]]
    place = np.arange(len(names))
    size = max(9.0, 2.0 + 2.4 * len(names)), 4.8
    figure, both = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for axes, (key, title) in zip(both, panels):
        for shift, test, label, colour in _BARS:
            values = [100 * (model[test][key] or 0) for model in report["new"]]
            bars = axes.bar(place + shift, values, 0.38, label=label, color=colour)
            # A white box, so that reference lines do not cross the figure out.
            box = {"fc": "white", "ec": "none", "pad": 0.8}
            axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=3, bbox=box, zorder=5)
        _reference_lines(axes, report, key)
        axes.set(title=title, ylim=(0, 112), xlim=(-0.6, len(names) - 0.4))
        axes.set_yticks(range(0, 101, 20))
        axes.set_xticks(place, names, fontsize=9)
        axes.grid(True, axis="y", alpha=0.35)
        axes.set_axisbelow(True)
        below = -0.14 - 0.05 * max(name.count("\n") for name in names)
        axes.legend(*_bars_first(axes), loc="upper center", bbox_to_anchor=(0.5, below), ncols=2, fontsize=8.5)
    both[0].set_ylabel("%")
    return _save(figure, path)


def _wrapped(name, width=16):
    """A long name broken into lines after underscores, so that axis labels do not overlap."""
    lines = [""]
    for part in name.replace("_", "_ ").split():
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _bars_first(axes):
    handles, labels = axes.get_legend_handles_labels()
    lines = sum(isinstance(handle, plt.Line2D) for handle in handles)  # matplotlib lists lines before bars
    return handles[lines:] + handles[:lines], labels[lines:] + labels[:lines]


def plot_backfill(report, path):
    """TPIR over the share of the gallery re-embedded by a new model, with old and independent self-test as lines."""
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for model in report["new"]:
        values = [np.nan if value is None else 100 * value for value in model["backfill"]["tpir"]]
        axes.plot(model["backfill"]["percent"], values, marker="o", markersize=4, label=model["name"])
    _reference_lines(axes, report, "tpir")
    axes.set(
        title=f"{report['data']['subset']} 1:N while the gallery is re-embedded",
        xlim=(0, 100),
        xlabel="gallery re-embedded by the new model, %",
        ylabel=f"TPIR at FPIR {report['data']['fpir']:g}, %",
    )
    axes.set_xticks(range(0, 101, 10))
    axes.grid(True, alpha=0.35)
    columns = 1 if max(len(model["name"]) for model in report["new"]) > 25 else 3
    figure.legend(loc="outside lower center", ncols=columns, fontsize=9)
    return _save(figure, path)


def _reference_lines(axes, report, key):
    for role, style in (("old", "--"), ("independent", ":")):
        if role in report and report[role]["self"][key] is not None:
            value = 100 * report[role]["self"][key]
            axes.axhline(value, color="black", linestyle=style, linewidth=1.4, label=f"{role} self-test {value:.1f}")


def _save(figure, path):
    with writing(path) as file:
        figure.savefig(file, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
