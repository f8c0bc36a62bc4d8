"""Old features that this repo's training did not make: of a model from outside, or stored ones, row by row checked."""

import hashlib
import pathlib

import numpy as np

from backbones.model_files import AsBackbone, ModelFile, Preprocessing, load_model
from core.config import expand
from core.manifest import digest, read_manifest
from engine.extract import extract_features, shared_arrays
from old_model.feature_set import FeatureError, open_array

CHUNK = 1 << 15  # rows at once
NO_ROW = -1


def add_arguments(parser):
    """The options of get_feature.py in place of a config."""
    add = parser.add_argument_group("in place of a config").add_argument
    add("--model", metavar="FILE", help="x.onnx, x.pt, x.pth, x.safetensors, or MXNet's prefix,epoch")
    add("--network", metavar="NET", help="backbone of a state dict (default: found by its keys)")
    add("--mean", type=float, default=127.5, help="the model gets (pixel - mean) / std (default: 127.5)")
    add("--std", type=float, default=127.5, help="(default: 127.5)")
    add("--bgr", action="store_true", help="channels in the order BGR, as models of AdaFace and CVLFace want them")
    add("--features", type=expand, metavar="F.npy", help="stored features, float [M, D], with --labels or --paths")
    add("--labels", type=expand, metavar="L.npy", help="their classes: row i is image i of the record file")
    add(
        "--paths",
        type=expand,
        metavar="P.txt",
        help="their images, a line a row, as in images.txt beside the record file",
    )


# --- a model ----------------------------------------------------------------------------------------------------------


def made_with(args):
    """The manifest's facts of features of --model, and the ModelFile."""
    if args.std <= 0:
        raise FeatureError(f"--std {args.std:g} must be above 0")
    model_file = ModelFile(args.model, args.network, Preprocessing(args.mean, args.std, args.bgr))
    model_file.check_files()
    facts = {"model": digest(model_file.paths[0]), "network": model_file.found_network}
    return {**facts, "preprocessing": str(model_file.preprocessing)}, model_file


def embed(model_file, facts, train_set, files, cfg, device):
    """Embed the record set with a model from outside; all ranks call it together."""
    model = AsBackbone(load_model(model_file, device))
    extract_features(
        model,
        train_set,
        files.feature,
        files.label,
        embedding_size=model.num_features,
        batch_size=cfg.batch_size,
        num_workers=cfg.num_workers,
        made_from=facts,
        device=device,
    )


# --- stored features --------------------------------------------------------------------------------------------------


def take_stored(args, train_set, files):
    """Write stored features in the order of the record set, zeros for images that have none; on rank 0 alone.

    Raises FeatureError for rows that do not belong to these images, and for rows that are not finite.
    """
    stored = _open("--features", args.features, 2, np.floating, "float16, float32 or float64, int8 times its scale")
    if not len(stored):
        raise FeatureError(f"--features {args.features}: has no rows")
    row_of = rows_by_label(args, stored, train_set) if args.labels else rows_by_path(args, stored, train_set)
    of_features = files.feature, (len(train_set), stored.shape[1]), np.float32
    of_labels, norms = (files.label, (len(train_set),), np.int64), []
    with shared_arrays(of_features, of_labels) as (features, labels):
        for start in range(0, len(train_set), CHUNK):
            rows = row_of[start : start + CHUNK]
            there = rows != NO_ROW
            values = np.zeros((len(rows), stored.shape[1]), np.float32)
            values[there] = stored[rows[there]]
            length = np.linalg.norm(values.astype(np.float64), axis=1)
            if not np.isfinite(length).all():
                wrong = rows[np.argmax(~np.isfinite(length))]
                raise FeatureError(f"--features {args.features}: row {wrong} is not finite; embed that image again")
            norms.append(length)
            features.write(start, values)
        labels.write(0, train_set.labels())
        norms = np.concatenate(norms)
        present = norms[norms > 0]
        if not len(present):
            raise FeatureError(f"--features {args.features}: all rows are zero, there is nothing to be compatible with")
        facts = {"records": train_set.digest(), "rows": len(train_set)}
        without = len(norms) - len(present)
        stated = {"width": stored.shape[1], "without_feature": without, "features": digest(args.features)}
        features.describe("features", **facts, **stated)
        labels.describe("labels", **facts)
    low, middle, high = np.quantile(present, [0, 0.5, 1])
    print(f"norms of the features: median {middle:.4g}, from {low:.4g} to {high:.4g}; all are finite")
    if without:
        print(f"{without} of {len(norms)} images have no feature: their rows are zero, and they have no old-side term")


def _open(option, path, ndim, kind, what):
    try:
        return open_array(path, ndim, kind, f"give an .npy of {what}, {'[rows, width]' if ndim == 2 else '[rows]'}")
    except FeatureError as error:
        raise FeatureError(f"{option} {error}") from error


def rows_by_label(args, stored, train_set):
    """Row i is image i; every label is compared."""
    labels, own = _open("--labels", args.labels, 1, np.integer, "integers"), train_set.labels()
    for name, count in (("--features", len(stored)), ("--labels", len(labels))):
        if count != len(own):
            path = getattr(args, name[2:])
            raise FeatureError(
                f"{name} {path}: {count} rows, but {train_set.path} has {len(own)} images; with --labels row i is "
                "image i, with --paths any order and number will do"
            )
    wrong = np.flatnonzero(np.asarray(labels) != own)
    if len(wrong):
        raise FeatureError(
            f"--labels {args.labels}: row {wrong[0]} is of class {labels[wrong[0]]}, in {train_set.path} of class "
            f"{own[wrong[0]]} ({len(wrong)} rows differ); write them in the record file's order, or give --paths"
        )
    return np.arange(len(own))


def rows_by_path(args, stored, train_set):
    """int64 [N]: the row of each image's feature, found by its line in images.txt; NO_ROW if it has none."""
    beside = pathlib.Path(train_set.path).with_name("images.txt")
    if not beside.is_file():
        raise FeatureError(
            f"--paths: needs {beside}, which folder_to_rec.py writes; for another record file put the features into "
            "its order, and give --labels"
        )
    own, given = keys_of_lines(beside), keys_of_lines(args.paths)
    again = "write both again with tools/make_dataset/folder_to_rec.py"
    read_manifest(beside, again).require("records", train_set.digest(), train_set.path, again)
    if len(own) != len(train_set):
        raise FeatureError(f"{beside}: {len(own)} lines, but {train_set.path} has {len(train_set)} images; {again}")
    if len(given) != len(stored):
        raise FeatureError(
            f"--paths {args.paths}: {len(given)} lines, but {args.features} has {len(stored)} rows; a line a row"
        )
    order = np.argsort(given, kind="stable")
    twice = np.flatnonzero(given[order[1:]] == given[order[:-1]])
    if len(twice):
        first, second = order[twice[0]] + 1, order[twice[0] + 1] + 1
        raise FeatureError(f"--paths {args.paths}: lines {first} and {second} are the same path; keep one of the rows")
    place = np.searchsorted(given, own, sorter=order).clip(max=len(given) - 1)
    rows = np.where(given[order[place]] == own, order[place], NO_ROW)
    found = int((rows != NO_ROW).sum())
    if not found:
        example = first_line(beside)
        raise FeatureError(
            f"--paths {args.paths}: no line is in {beside}, whose first is {example!r}; write paths as there"
        )
    if found < len(given):
        print(f"{len(given) - found} of {len(given)} rows of {args.features} are of images that {beside} does not list")
    return rows


def keys_of_lines(path):
    """uint64 [lines]: a digest of each line, as millions of paths would fill the memory."""
    try:
        with open(path, "rb") as file:
            return np.fromiter((_key(line) for line in file), np.uint64)
    except OSError as error:
        raise FeatureError(f"{path}: cannot be read ({error.strerror}); it needs a path a line") from error


def _key(line):
    return int.from_bytes(hashlib.blake2b(line.strip().removeprefix(b"./"), digest_size=8).digest(), "little")


def first_line(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline().strip()
