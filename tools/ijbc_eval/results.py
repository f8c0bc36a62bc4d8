"""Result files and tables.

A result file is an npz of one test on one subset for K named runs:
    names str [K], task "11" or "1N", subset, protocol "exact" or "published", input_scale, bad_images str [·]
    widths int [2]: dimensions of the gallery's and of the probes' model
    preprocessing str [2]: what these two get
    models str: digest of the model's file, in a cross-test of the probes' and the gallery's model
    place str: which set of that name
    1:1   scores float32 [K, P], label bool [P] (same person); fprs [F], tprs [K, F], auc [K];
          accuracy [K], ten-fold, where that is customary
    1:N   scores float32 [K, G, Q], label bool [G, Q] (mated), rank int32 [K, G, Q], as in metrics.Search;
          galleries str [G]; mixed_rank int32 [K, Q], in the galleries merged into one;
          fpirs [F], tpirs [K, R, F], tops [T], top_rates [K, R, T]: R = the galleries, mean, if published also mixed
Figures follow `protocol`; scores, label and ranks are the same for both protocols and suffice for either.
"""

import sys

import numpy as np
from prettytable import PrettyTable

from tools.ijbc_eval import metrics
from tools.ijbc_eval.files import EvalError, writing


def verification_result(names, scores, label, subset, protocol="exact", fprs=metrics.FPRS, folds=False):
    """The arrays of a 1:1 result: names [K], scores float32 [K, P], label bool [P]; folds: with ten-fold accuracy."""
    tprs, aucs = zip(*(metrics.verification_summary(one, label, fprs, protocol) for one in scores))
    accuracy = {"accuracy": np.array([metrics.fold_accuracy(one, label) for one in scores])} if folds else {}
    return accuracy | {
        "task": "11",
        "subset": subset,
        "protocol": protocol,
        "names": np.array(names),
        "scores": scores,
        "label": label,
        "fprs": np.array(fprs),
        "tprs": np.array(tprs),
        "auc": np.array(aucs),
    }


def identification_result(names, runs, mixed_rank, subset, galleries, protocol="exact", fpirs=metrics.FPIRS):
    """The arrays of a 1:N result: names [K], runs K lists with a Search for each gallery, mixed_rank int [K, Q]."""
    tops, tpirs = zip(*(metrics.identification_summary(*run, protocol, fpirs) for run in zip(runs, mixed_rank)))
    return {
        "task": "1N",
        "subset": subset,
        "protocol": protocol,
        "names": np.array(names),
        "galleries": np.array(galleries),
        "mixed_rank": np.array(mixed_rank),
        "scores": np.array([[one.score for one in run] for run in runs]),
        "rank": np.array([[one.rank for one in run] for run in runs]),
        "label": np.array([one.mated for one in runs[0]]),
        "fpirs": np.array(fpirs),
        "tpirs": np.array(tpirs),
        "tops": np.array(metrics.TOP),
        "top_rates": np.array(tops),
    }


def free_path(path, models, place):
    """`path` or, where the result of other models or of another set lies, `path` with digits of what differs.

    models: digest of the models; place: the set's key, absent in results of earlier versions.
    """
    try:
        with np.load(path) as saved:
            parts = [models[:6]] if str(saved["models"]) != models else []
            parts += [place[-6:]] if str(saved.get("place", place)) != place else []
    except FileNotFoundError:
        return path
    except Exception:  # no result file, or one that does not say
        parts = [models[:6]]
    if not parts:
        return path
    free = path.with_name("_".join([path.stem, *parts]) + path.suffix)
    said = "is of other models or images, or does not say of which"
    print(f"note: {path} {said}; this result goes to {free}", file=sys.stderr)
    return free


def save(path, result):
    """Write a result file atomically."""
    with writing(path) as file:
        np.savez(file, **result)


def load(path, protocol="exact"):
    """Read a result file and recompute its figures; other tools' files too, if they have scores [K, P], names, label.

    EvalError if it cannot be read or its arrays are not as described at the top of this module.
    """
    found = _read(path)
    names, scores, label = [str(name) for name in np.atleast_1d(found["names"])], found["scores"], found["label"]
    subset = str(found.get("subset", "?"))
    one_to_n = scores.ndim == 3
    scores = scores if one_to_n else np.atleast_2d(scores)
    if not 2 <= scores.ndim <= 3 or label.shape != scores.shape[1:] or len(names) != len(scores) or not scores.size:
        shapes = f"{len(names)} names, scores {scores.shape}, label {label.shape}"
        raise EvalError(f"{path}: {shapes} do not fit together; write it with ijbc_eval.py -R")
    label = _checked_label(path, label)
    _check_scores(path, scores, label)
    if one_to_n:
        galleries = _check_search(path, found, scores, label, protocol)
        runs = [
            [metrics.Search(*parts) for parts in zip(label, ranks, run)] for ranks, run in zip(found["rank"], scores)
        ]
        mixed_rank = found.get("mixed_rank", [None] * len(runs))  # exact figures do not need it
        return identification_result(names, runs, mixed_rank, subset, galleries, protocol, found["fpirs"])
    if label.all() or not label.any():
        raise EvalError(
            f"{path}: label has pairs of one kind only, so there is no ROC; save genuine and impostor pairs"
        )
    fprs, folds = found["fprs"], "accuracy" in found
    return verification_result(names, scores, label, subset, protocol, fprs, folds)


def _read(path):
    """The arrays of a result file that its figures are computed from."""
    try:
        saved = np.load(path)
        if not isinstance(saved, np.lib.npyio.NpzFile):
            raise ValueError("a single array, not an npz")
        with saved:
            wanted = ("scores", "label", "names", "subset", "rank", "galleries", "mixed_rank", "accuracy")
            found = {key: saved[key] for key in wanted if key in saved.files}
            found |= {"fprs": _rates(saved, "fprs", metrics.FPRS), "fpirs": _rates(saved, "fpirs", metrics.FPIRS)}
    except Exception as error:  # whatever NumPy and zipfile raise on damaged bytes
        raise EvalError(f"{path}: cannot be read as a result file ({error}); write it with ijbc_eval.py -R") from None
    missing = [key for key in ("scores", "names", "label") if key not in found]
    if missing:
        raise EvalError(f"{path}: has no array {missing[0]!r}; write it with ijbc_eval.py -R")
    return found


def _rates(saved, key, usual):
    """The rates that a file's figures were read at; `usual` where it has none, or no rates."""
    rates = saved[key] if key in saved.files else np.array(usual)
    sound = rates.dtype.kind == "f" and rates.ndim == 1 and len(rates) and ((rates > 0) & (rates <= 1)).all()
    return rates if sound else np.array(usual)


def _checked_label(path, label):
    if label.dtype.kind not in "biuf" or not np.isin(label, (0, 1)).all():
        raise EvalError(f"{path}: label must be 1 or true (same person, mated), 0 or false; save it again")
    return label.astype(bool)


def _check_scores(path, scores, label):
    """EvalError unless scores are finite; a mated probe that is not the first has −inf."""
    if scores.dtype.kind not in "fiu":
        raise EvalError(f"{path}: scores are of type {scores.dtype}; save them as float32")
    wrong = ~np.isfinite(scores)
    if scores.ndim == 3:
        wrong &= ~(label & (scores == -np.inf))
    if wrong.any():
        run = int(np.argwhere(wrong)[0, 0])
        raise EvalError(f"{path}: scores of run {run} contain NaN or infinite ones; evaluate that model again")


def _check_search(path, found, scores, label, protocol):
    """The gallery names of a 1:N result; EvalError unless ranks and `galleries` fit its scores [K, G, Q] and label."""
    for key in ("rank", "galleries"):
        if key not in found:
            raise EvalError(
                f"{path}: no array {key!r}, but scores {scores.shape} are 1:N; write it with ijbc_eval.py -N -R"
            )
    rank, galleries = found["rank"], np.atleast_1d(found["galleries"])
    if rank.shape != scores.shape or rank.dtype.kind not in "iu" or len(galleries) != scores.shape[1]:
        raise EvalError(
            f"{path}: scores {scores.shape}, rank {rank.shape} ({rank.dtype}) and {len(galleries)} galleries do not "
            "fit together; save an integer rank for each score"
        )
    mixed_rank = found.get("mixed_rank")
    if mixed_rank is None and protocol == "published":
        raise EvalError(
            f"{path}: has no array 'mixed_rank', needed for the published \"mixed\" row; write it again with "
            "ijbc_eval.py -N -R"
        )
    if mixed_rank is not None and (mixed_rank.shape != scores[:, 0].shape or mixed_rank.dtype.kind not in "iu"):
        raise EvalError(
            f"{path}: scores {scores.shape} and mixed_rank {mixed_rank.shape} ({mixed_rank.dtype}) do not fit "
            "together; save an integer mixed_rank for each run and probe"
        )
    if (rank[:, label] < 1).any() or rank[:, ~label].any():
        raise EvalError(f"{path}: rank must be 1 or more for mated probes, 0 for others; write it with ijbc_eval.py -N")
    return [str(name) for name in galleries]


def percent(value):
    return "–" if np.isnan(value) else f"{100 * value:.2f}"


def tables(result):
    """The tables of a result, as text; figures in %, except the AUC."""
    exact = result["protocol"] == "exact"
    read = "" if exact else ", published"
    if result["task"] == "11":
        folds = ["ten-fold accuracy"] if "accuracy" in result else []
        table = PrettyTable([f"1:1 TPR % at FPR{read}", *(f"{fpr:g}" for fpr in result["fprs"]), "AUC", *folds])
        accuracy = [[percent(value)] for value in result["accuracy"]] if folds else [[]] * len(result["names"])
        for name, tprs, auc, shown in zip(result["names"], result["tprs"], result["auc"], accuracy):
            table.add_row([name, *map(percent, tprs), f"{auc:.6f}", *shown])
        if not exact:
            return table.get_string()  # the nearest point may lie above the FPR, so the list's resolution is no limit
        impostors = np.count_nonzero(~result["label"])
        return table.get_string() + _resolution("FPR", result["fprs"], impostors, "impostor pairs")
    columns = [*(f"top-{k}" for k in result["tops"]), *(f"TPIR at {fpir:g}" for fpir in result["fpirs"])]
    table = PrettyTable([f"1:N %{read}", "gallery", *columns])
    for name, tops, tpirs in zip(result["names"], result["top_rates"], result["tpirs"]):
        for gallery, top, tpir in zip([*result["galleries"], "mean", *([] if exact else ["mixed"])], tops, tpirs):
            if gallery != "mean" or len(result["galleries"]) > 1:
                table.add_row([name, gallery, *map(percent, top), *map(percent, tpir)])
    others = int(np.min(np.count_nonzero(~result["label"], axis=1)))
    text = table.get_string() + _resolution("FPIR", result["fpirs"], others, "non-mated probes", 1 if exact else 2)
    nowhere = int(np.count_nonzero(~result["label"].any(axis=0)))
    return text if exact or not nowhere else f"{text}\n{in_no_gallery(nowhere)}"


def in_no_gallery(count):
    return f"{count} probes are of people in no gallery; each counts as a miss in a top-k over all probes"


def _resolution(rate, points, count, what, first=1):
    """A note under the table if the list is too short for the finest points, at which no error is allowed then.

    first: `rate` · count from which one error is allowed; the published TPIR allows one fewer than the rate says.
    """
    if count and min(points) * count < first:
        return f"\n{count} {what}: below {rate} {first / count:.1g} no error is allowed, so those columns are equal"
    return ""
