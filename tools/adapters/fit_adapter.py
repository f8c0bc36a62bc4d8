"""Fit a map from a new model's features to an old model's: the rival of every method that trains for compatibility.

    python tools/get_feature/get_feature.py configs/f128_r18_softmax_class30.py --SD f128_r18_softmax_class70
    python tools/get_feature/get_feature.py configs/f128_r50_arc_data100.py --SD f128_r50_arc_class70
    python tools/adapters/fit_adapter.py --kind procrustes --out work_dirs/f128_r50_arc_data100/procrustes.npz \\
        --new feature_save/OPclass/f128_r50_arc_class70_feature.npy \\
        --old feature_save/OPclass/f128_r18_softmax_class70_feature.npy

Row i of both files is image i of one training set. With the L2-normalised rows F [N, d_new] and G [N, d_old], not
centred, a map M takes a new feature f to fM, which is normalised again:

    procrustes   M = P Qᵀ with P Σ Qᵀ = SVD(Fᵀ G), singular vectors of the smaller width: of all M with orthonormal
                 columns (or rows, if the new width is the smaller one) that with the largest sum of f_i M · g_i
    ridge        M = (Fᵀ F + s N / d_new · I)⁻¹ Fᵀ G; N / d_new is the mean eigenvalue of Fᵀ F

A tenth of the people, by the …_label.npy beside the new features, is held out of a first fit, which tells how close
mapped features come to the old ones of other people, and chooses the strength s from 1e-6, 1e-5, ..., 10 by the mean
cosine; the map that is written is fitted on all rows. Both files must be of one record set, as their manifests say;
they are read in chunks.
"""

import argparse
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from core.errors import report_errors
from core.manifest import read_manifest
from old_model.by_class import normalise, row_chunks
from old_model.feature_set import RowFile, label_path, rewrite_from_images
from tools.adapters.adapter import Adapter, AdapterError, unit

KINDS = ("procrustes", "ridge")
STRENGTHS = tuple(10.0**power for power in range(-6, 2))
HELD_OUT = 10  # one class of so many, the last ones; without labels one row


def procrustes(cross):
    """The orthogonal map [d_new, d_old] of Fᵀ G [d_new, d_old] (Schönemann, Psychometrika 1966)."""
    left, _, right = np.linalg.svd(cross, full_matrices=False)
    return left @ right


def ridge(gram, cross, strength):
    """The regression's map [d_new, d_old] of Fᵀ F [d_new, d_new], of unit rows, and Fᵀ G [d_new, d_old]."""
    return np.linalg.solve(gram + strength * np.trace(gram) / len(gram) * np.eye(len(gram)), cross)


def solve(kind, gram, cross, strength):
    return procrustes(cross) if kind == "procrustes" else ridge(gram, cross, strength)


def fit(kind, new, old, labels=None):
    """Fit a map to paired rows [N, d_new] and [N, d_old]; kind: one of KINDS.

    new, old: float, any scale, arrays or RowFiles; read in chunks, sums in float64. A pair with a row of zeros, an
    image without a feature, is left out. labels: int [N], whose each row is, so that the people held out are others;
    None: the last rows are held out. Returns `(matrix float64 [d_new, d_old], statement)`, the statement's values
    from the fit: rows (used), held_out_cosine and strength (None for procrustes).
    Raises FeatureError for non-finite rows, AdapterError for too few.
    """
    whose = np.arange(len(new)) if labels is None else labels
    classes = np.unique(whose)
    apart = np.isin(whose, classes[len(classes) - len(classes) // HELD_OUT :])
    kept, apart = np.flatnonzero(~apart), np.flatnonzero(apart)
    gram, cross, used = moments(new, old, kept)
    own_gram, own_cross, held_out = moments(new, old, apart)
    if used < new.shape[1] or not held_out:
        raise AdapterError(
            f"{getattr(new, 'path', 'the features')}: {used} rows with an old feature, and {held_out} held out, "
            f"do not determine a map of features of width {new.shape[1]}; embed a larger record set"
        )
    strengths = STRENGTHS if kind == "ridge" else (None,)
    candidates, cosines = [solve(kind, gram, cross, strength) for strength in strengths], np.zeros(len(strengths))
    for rows, targets in unit_pairs(new, old, apart):
        cosines += [np.einsum("nd,nd->", unit(rows @ candidate), targets) for candidate in candidates]
    best = int(np.argmax(cosines))
    matrix = solve(kind, gram + own_gram, cross + own_cross, strengths[best])
    cosine = round(cosines[best] / held_out, 6)
    return matrix, {"rows": used + held_out, "held_out_cosine": cosine, "strength": strengths[best]}


def moments(new, old, index):
    """`(Fᵀ F, Fᵀ G, number of pairs)` of the rows `index`."""
    gram, cross, pairs = np.zeros((new.shape[1],) * 2), np.zeros((new.shape[1], old.shape[1])), 0
    for rows, targets in unit_pairs(new, old, index):
        gram += rows.T @ rows
        cross += rows.T @ targets
        pairs += len(rows)
    return gram, cross, pairs


def unit_pairs(new, old, index):
    """Yield the L2-normalised rows `index` of both, float64, a chunk at a time, without pairs with zeros."""
    for (_, rows), (_, targets) in zip(row_chunks(new, index), row_chunks(old, index)):
        both = rows.any(axis=1) & targets.any(axis=1)
        rows, targets = rows[both], targets[both]
        normalise(rows)
        normalise(targets)
        yield rows, targets


def open_pairs(new_path, old_path):
    """`(new, old, labels, made_from)`: RowFiles [N, d_new] and [N, d_old], int [N] or None without the file, and the
    digests of both models where known.

    Raises FeatureError for an unreadable file, ManifestError and AdapterError for files of two record sets.
    """
    new, old = (RowFile(path, 2, np.floating) for path in (new_path, old_path))
    together = "embed one record set with both models"
    if len(new) != len(old):
        raise AdapterError(f"{new_path}: {len(new)} rows, but {old_path} has {len(old)}; {together}")
    of_new, of_old = (read_manifest(path, rewrite_from_images(path)) for path in (new_path, old_path))
    of_new.require("records", of_old.get("records"), old_path, together)
    models = {"new_model": of_new.get("model"), "old_model": of_old.get("model")}
    return new, old, read_labels(pathlib.Path(label_path(new_path)), len(new), of_new), models


def read_labels(path, rows, of_features):
    """The labels int [rows], or None without the file; of_features: the Manifest of the features beside it."""
    if path == of_features.path or not path.is_file():
        print(
            f"note: no {path.name}: the last rows are held out, perhaps of the same people as others", file=sys.stderr
        )
        return None
    labels = RowFile(path, 1, np.integer)
    read_manifest(path, rewrite_from_images(path)).require(
        "records", of_features.get("records"), of_features.path, "write features and labels of one record set"
    )
    if len(labels) != rows:
        raise AdapterError(f"{path}: {len(labels)} rows, but the features have {rows}; write both of one record set")
    return labels[:]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--new", type=pathlib.Path, required=True, metavar="FILE", help="the new model's …_feature.npy")
    add("--old", type=pathlib.Path, required=True, metavar="FILE", help="the old model's, of the same record set")
    add("--kind", choices=KINDS, default=KINDS[0], help=f"(default: {KINDS[0]})")
    add("--out", type=pathlib.Path, required=True, metavar="FILE", help="the map, an .npz")
    arguments = parser.parse_args(argv)
    with report_errors():
        new, old, labels, models = open_pairs(arguments.new, arguments.old)
        matrix, fitted = fit(arguments.kind, new, old, labels)
        files = {"kind": arguments.kind, "new": str(arguments.new), "old": str(arguments.old)}
        widths = {"new_width": new.shape[1], "old_width": old.shape[1]}
        adapter = Adapter(matrix, {**files, **models, **widths, **fitted}, arguments.out)
        adapter.save()
        print(f"wrote {arguments.out}: {adapter}")


if __name__ == "__main__":
    main()
