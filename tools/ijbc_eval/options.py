"""The command-line options that ijbc_eval.py and compat_report.py share."""

import argparse
import os

from backbones.model_files import ModelFile, Preprocessing
from core.config import REPO, expand
from tools.ijbc_eval.evaluation import DEFAULT_CACHE, Evaluation
from tools.ijbc_eval.evaluation_set import INPUT_SCALE
from tools.ijbc_eval.files import EvalError
from tools.ijbc_eval.metrics import PROTOCOLS
from tools.ijbc_eval.own_set import CropSet, open_bin, open_crops
from tools.ijbc_eval.protocol import SUBSETS, Protocol
from tools.ijbc_eval.stored import StoredFeatures, open_stored


def whole_number(low):
    """An argparse type: an integer of at least `low`."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {low}, not {text}")
        return value

    return parse


def positive(text):
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value


def split_name(text):
    """`NAME=FILE` -> (name, file), `FILE` -> ("", file). A path may contain "=" too (runs/lr=0.1/model.pt), so the text
    before the first one is a name only without "/"."""
    name, equals, file = text.partition("=")
    return (name, file) if equals and "/" not in name else ("", text)


def add_data_arguments(parser):
    """The options of the data, its cache, and how figures are computed."""
    add = parser.add_argument
    help_data = "directory of IJBC/ and/or IJBB/ (default: dataset under the repo root)"
    add("-d", "--data_path", type=expand, default=REPO / "dataset", help=help_data)
    add("-s", "--subset", choices=list(SUBSETS), default="IJBC", help="(default: IJBC)")
    help_bin = "instead of IJB, 1:1: insightface's set of pairs, such as lfw.bin"
    add("--bin", type=expand, metavar="FILE", help=help_bin)
    help_pairs = (
        "instead of IJB, 1:1: lines `first<TAB>second<TAB>1 or 0` of 112×112 aligned faces, paths relative to ROOT, "
        "1 = the same person; a cross-test's old side is the first"
    )
    add("--pairs", type=expand, nargs=2, metavar=("FILE", "ROOT"), help=help_pairs)
    help_gallery = (
        "instead of IJB, with or without --pairs, 1:N: folders with a sub-folder of 112×112 aligned faces for each "
        "person; people of --probe alone are non-mated, and of several gallery images of a person the best one counts"
    )
    add("--gallery", type=expand, metavar="DIR", help=help_gallery)
    help_probe = (
        "see --gallery; alone, the gallery is the old side's stored features, labelled by person (ijbc_eval.py -m_old)"
    )
    add("--probe", type=expand, metavar="DIR", help=help_probe)
    help_labels = (
        "the old side may be stored features, an .npy of float32, float16 or int8 [rows, width]. FILE has a line for "
        "each row: the image's path relative to ROOT, or to the folder that holds DIR (.bin: its position; IJB: the "
        "file's name), or, with --probe alone, the person"
    )
    add("--old_labels", type=expand, metavar="FILE", help=help_labels)
    help_scale = "int8: a number, or an .npy with one for each dimension, or [rows, 1]"
    add("--old_scale", metavar="SCALE", help=help_scale)
    help_exact = "the features before rounding, an .npy with the same labels, or their model: what was lost is printed"
    add("--old_float32", type=expand, metavar="FILE", help=help_exact)
    add("-b", "--batch_size", type=whole_number(1), default=128, help="images per forward pass (default: 128)")
    add("-F", "--force_reload", action="store_true", help="ignore all caches and recompute")
    add("--skip-bad-images", action="store_true", help="skip unusable images and list them in the result")
    help_workers = "processes that read and align images, 0: this one (default: the number of cores, at most 16)"
    add("--workers", type=whole_number(0), default=min(os.cpu_count() or 1, 16), help=help_workers)
    help_cache = f"cached embeddings and parsed lists (default: {DEFAULT_CACHE} in the current directory)"
    add("--cache-dir", type=expand, default=DEFAULT_CACHE, help=help_cache)
    add(
        "--input-scale",
        type=positive,
        metavar="S",
        help=f"the models' input is (pixel - 127.5) / S (default: {INPUT_SCALE:g} on IJB, as published for it, else "
        f"{CropSet.input_scale:g}, as in training and feature extraction); ignored by MXNet models that scale their "
        "input themselves",
    )
    for_one = "for all models, or with NAME= for one"
    help_mean = f"what is subtracted from the pixels {for_one} (default: 127.5)"
    add("--mean", type=_for_model, action="append", default=[], metavar="[NAME=]M", help=help_mean)
    help_std = f"what they are then divided by {for_one} (default: that of --input-scale)"
    add("--std", type=_for_model, action="append", default=[], metavar="[NAME=]S", help=help_std)
    help_bgr = "feed channels in the order BGR, as models of AdaFace and CVLFace want them: to all models, or to NAME"
    add("--bgr", nargs="?", const="", action="append", default=[], metavar="NAME", help=help_bgr)
    add(
        "--protocol",
        choices=PROTOCOLS,
        default="exact",
        help="exact (the default): no more false positives than the FPR or FPIR allows, 1:N as the mean of the "
        "galleries; published: as in the published scripts, to compare with published numbers: 1:1 at the ROC point "
        "with the nearest FPR; TPIR above the non-mated score number max(int(n*FPIR), 1) from the top; top-k from the "
        "hits in both galleries, and in both merged into one (mixed)",
    )


def _for_model(text):
    """An argparse type: `[NAME=]NUMBER` -> (name, number)."""
    name, equals, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf") or (equals and not name):
        raise argparse.ArgumentTypeError(f"must be a number or NAME=NUMBER, not {text}")
    return name, value


def with_preprocessing(arguments, models, scale):
    """`models` {name: ModelFile or StoredFeatures} with what --mean, --std and --bgr say of all or of one of them.

    scale: the usual --std.
    """
    named = {name for name, _ in (*arguments.mean, *arguments.std)} | set(arguments.bgr)
    if unknown := sorted(named - {"", *models}):
        raise EvalError(f"--mean, --std, --bgr: no model is named {unknown[0]!r}; NAME is one of {', '.join(models)}")
    if any(value <= 0 for _, value in arguments.std):
        raise EvalError("--std: must be above 0")
    found = {}
    for name, model in models.items():
        mean, std = (
            {key: value for key, value in given if key in ("", name)} for given in (arguments.mean, arguments.std)
        )
        bgr = bool({"", name} & set(arguments.bgr))
        if (mean or std or bgr) and isinstance(model, ModelFile):
            values = [one.get(name, one.get("", usual)) for one, usual in ((mean, 127.5), (std, scale))]
            model = ModelFile(model.file, model.network, Preprocessing(*values, bgr))
        found[name] = model
    return found


def open_old_side(arguments, file, network):
    """`(old side, its float32 original or None)`: each a ModelFile, or stored.StoredFeatures for an .npy file."""
    exact = arguments.old_float32
    if not file.endswith(".npy"):
        given = {"--old_labels": arguments.old_labels, "--old_scale": arguments.old_scale, "--old_float32": exact}
        for option, value in given.items():
            if value:
                raise EvalError(f"{option}: is for stored features, an .npy file, not for the model {file}")
        return ModelFile(file, network), None
    stored = open_stored(expand(file), arguments.old_labels, arguments.old_scale)
    if not exact:
        return stored, None
    if exact.suffix != ".npy":
        return stored, ModelFile(str(exact), network)
    exact = open_stored(exact, arguments.old_labels)
    if exact.rows.shape != stored.rows.shape:
        raise EvalError(
            f"--old_float32 {exact.file}: {list(exact.rows.shape)}, but {stored.file} has {list(stored.rows.shape)}; "
            "give the same rows before rounding"
        )
    return stored, exact


def open_set(arguments, old=None):
    """The evaluation set that the options ask for; EvalError unless they go together. old: the old side, or None."""
    gallery, probe, enrolled = arguments.gallery, arguments.probe, None
    if probe and not gallery and isinstance(old, StoredFeatures):
        enrolled = old.names
    elif bool(gallery) != bool(probe):
        raise EvalError(
            "--gallery and --probe go together: a folder of enrolled people, and one of queries; --probe alone needs a "
            "stored gallery as the old side, labelled by person"
        )
    if arguments.bin:
        if arguments.pairs or probe:
            raise EvalError("--bin is a set of its own; give it without --pairs, --gallery and --probe")
        if not arguments.bin.is_file():
            raise EvalError(f"--bin {arguments.bin}: no such file; check the path")
        return open_bin(arguments.bin)
    if arguments.pairs or probe:
        return open_crops(arguments.pairs, gallery, probe, enrolled)
    return Protocol(arguments.data_path, arguments.subset, arguments.cache_dir, arguments.force_reload)


def open_evaluation(arguments, old=None):
    """The Evaluation that the options ask for. old: the old side, whose stored features may be the gallery."""
    return Evaluation(
        open_set(arguments, old),
        arguments.cache_dir,
        arguments.force_reload,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        skip_bad=arguments.skip_bad_images,
        input_scale=arguments.input_scale,
    )
