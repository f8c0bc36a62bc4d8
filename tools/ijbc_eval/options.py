"""The command-line options that ijbc_eval.py and compat_report.py share."""

import argparse
import os

from backbones.model_files import ModelFile, Preprocessing
from core.config import REPO, expand
from tools.ijbc_eval.embed import INPUT_SCALE
from tools.ijbc_eval.evaluation import DEFAULT_CACHE, Evaluation
from tools.ijbc_eval.files import EvalError
from tools.ijbc_eval.metrics import PROTOCOLS
from tools.ijbc_eval.protocol import SUBSETS


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
        default=INPUT_SCALE,
        metavar="S",
        help=f"the models' input is (pixel - 127.5) / S (default: {INPUT_SCALE:g}, as published for IJB; training and "
        "feature extraction use 127.5); ignored by MXNet models that scale their input themselves",
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


def with_preprocessing(arguments, models):
    """The ModelFiles {name: ModelFile} with what --mean, --std and --bgr say of all or of one of them."""
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
        if mean or std or bgr:
            values = [one.get(name, one.get("", usual)) for one, usual in ((mean, 127.5), (std, arguments.input_scale))]
            model = ModelFile(model.file, model.network, Preprocessing(*values, bgr))
        found[name] = model
    return found


def open_evaluation(arguments):
    return Evaluation(
        arguments.data_path,
        arguments.subset,
        arguments.cache_dir,
        arguments.force_reload,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        skip_bad=arguments.skip_bad_images,
        input_scale=arguments.input_scale,
    )
