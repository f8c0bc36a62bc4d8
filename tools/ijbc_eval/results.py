"""Result files and tables.

A result file is an npz, one test of one subset for K named runs:
    names str [K], task "11" or "1N", subset, fpr_point, bad_images str [·]
    1:1   scores float32 [K, P], label bool [P] (same person); fprs [F], tprs [K, F], auc [K]
    1:N   scores float32 [K, G, Q], label bool [G, Q] (mated), rank int32 [K, G, Q], as in identification.Search;
          galleries str [G]; fpirs [F], tpirs [K, G+1, F], tops [T], top_rates [K, G+1, T], last row = mean of galleries
"""

import zipfile

import numpy as np
from prettytable import PrettyTable

from tools.ijbc_eval import identification, verification
from tools.ijbc_eval.files import EvalError, publish


def verification_result(names, scores, label, subset, point="exact"):
    """The arrays of a 1:1 result: names [K], scores float32 [K, P], label bool [P]."""
    tprs, aucs = zip(*(verification.summary(one, label, point=point) for one in scores))
    return {
        "task": "11", "subset": subset, "names": np.array(names), "scores": scores, "label": label, "fpr_point": point,
        "fprs": np.array(verification.FPRS), "tprs": np.array(tprs), "auc": np.array(aucs),
    }


def identification_result(names, runs, subset, galleries):
    """The arrays of a 1:N result: names [K], runs K lists with a Search for each of the galleries."""
    tops, tpirs = zip(*(identification.summary(run) for run in runs))
    return {
        "task": "1N", "subset": subset, "names": np.array(names), "galleries": np.array(galleries),
        "scores": np.array([[one.score for one in run] for run in runs]),
        "rank": np.array([[one.rank for one in run] for run in runs]),
        "label": np.array([one.mated for one in runs[0]]),
        "fpirs": np.array(identification.FPIRS), "tpirs": np.array(tpirs),
        "tops": np.array(identification.TOP), "top_rates": np.array(tops),
    }


def save(path, result):
    """Write a result file, whole or not at all."""
    with publish(path) as partial, open(partial, "wb") as file:
        np.savez(file, **result)


def load(path, point="exact"):
    """Read a result file and work out its figures anew; another tool's too, if it holds scores [K, P], names, label."""
    try:
        with np.load(path) as saved:
            found = {key: saved[key] for key in ("scores", "label", "names", "task", "subset", "rank", "galleries")
                     if key in saved.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise EvalError(f"{path}: cannot be read as a result file ({error})") from None
    missing = [key for key in ("scores", "names", "label") if key not in found]
    if missing:
        raise EvalError(f"{path}: has no array {missing[0]!r}; write it with ijbc_eval.py -R")
    names, scores, label = [str(name) for name in np.atleast_1d(found["names"])], found["scores"], found["label"]
    subset = str(found.get("subset", "?"))
    if scores.ndim == 3 and label.shape == scores.shape[1:] and "rank" in found and len(names) == len(scores):
        runs = [
            [identification.Search(*parts) for parts in zip(label.astype(bool), ranks, run)]
            for ranks, run in zip(found["rank"], scores)
        ]
        return identification_result(names, runs, subset, [str(name) for name in found["galleries"]])
    scores = np.atleast_2d(scores)
    if scores.ndim != 2 or label.shape != scores.shape[1:] or len(names) != len(scores):
        raise EvalError(f"{path}: {len(names)} names, scores {scores.shape}, label {label.shape} do not fit together")
    return verification_result(names, scores, label.astype(bool), subset, point)


def percent(value):
    return "–" if np.isnan(value) else f"{100 * value:.2f}"


def tables(result):
    """The tables of a result, as text: figures in %, but for the AUC."""
    if result["task"] == "11":
        table = PrettyTable(["1:1 TPR % at FPR", *(f"{fpr:g}" for fpr in result["fprs"]), "AUC"])
        for name, tprs, auc in zip(result["names"], result["tprs"], result["auc"]):
            table.add_row([name, *map(percent, tprs), f"{auc:.6f}"])
        impostors = np.count_nonzero(~result["label"])
        return table.get_string() + _resolution("FPR", result["fprs"], impostors, "impostor pairs")
    columns = ["1:N %", "gallery", *(f"top-{k}" for k in result["tops"]), *(f"TPIR at {f:g}" for f in result["fpirs"])]
    table = PrettyTable(columns)
    for name, tops, tpirs in zip(result["names"], result["top_rates"], result["tpirs"]):
        for gallery, top, tpir in zip([*result["galleries"], "mean"], tops, tpirs):
            table.add_row([name, gallery, *map(percent, top), *map(percent, tpir)])
    others = int(np.min(np.count_nonzero(~result["label"], axis=1)))
    return table.get_string() + _resolution("FPIR", result["fpirs"], others, "non-mated probes")


def _resolution(rate, points, count, what):
    """A line under the table where the list is too short for the finest points: they then allow no error at all."""
    if count and min(points) * count < 1:
        return f"\n{count} {what}: below {rate} {1 / count:.1g} no error is allowed, so those columns are equal"
    return ""
