"""The command-line options that ijbc_eval.py and compat_report.py share."""

import argparse
import os
import pathlib

from core.config import REPO
from tools.ijbc_eval.evaluation import DEFAULT_CACHE, Evaluation
from tools.ijbc_eval.meta import GALLERIES
from tools.ijbc_eval.models import INPUT_SCALE
from tools.ijbc_eval.verification import PROTOCOLS


def whole_number(low):
    """An argparse type: an integer of at least `low`."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {low}, not {text}")
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


def add_data_arguments(parser):
    """The options that say where the data is and how data and figures are read."""
    add = parser.add_argument
    add(
        "-d",
        "--data_path",
        type=pathlib.Path,
        default=REPO / "dataset",
        help="directory that holds IJBC/ and/or IJBB/ (default: dataset under the repo root)",
    )
    add("-s", "--subset", choices=list(GALLERIES), default="IJBC")
    add("-b", "--batch_size", type=whole_number(1), default=128, help="images at once (default 128)")
    add("-F", "--force_reload", action="store_true", help="recompute everything, ignoring what is cached")
    add("--skip-bad-images", action="store_true", help="leave unreadable images out, and name them in the result")
    add(
        "--workers",
        type=whole_number(0),
        default=min(os.cpu_count() or 1, 16),
        help="processes that read and align images (default: the number of cores, at most 16); 0: in this one",
    )
    add(
        "--cache-dir",
        type=pathlib.Path,
        default=DEFAULT_CACHE,
        help=f"kept embeddings and parsed lists (default {DEFAULT_CACHE} in the current directory)",
    )
    add(
        "--input-scale",
        type=positive,
        default=INPUT_SCALE,
        metavar="S",
        help=f"models see (pixel - 127.5) / S (default {INPUT_SCALE:g}, as published for IJB; training and feature "
        "extraction have 127.5); no effect on MXNet models that scale their input themselves",
    )
    add(
        "--protocol",
        choices=PROTOCOLS,
        default="exact",
        help="exact: no more false positives than the FPR or FPIR allows, 1:N as the mean of the galleries; published: "
        "as the scripts in circulation read it, to compare with published numbers: 1:1 at the ROC point with the "
        "nearest FPR; TPIR above the non-mated score number max(int(n*FPIR), 1) from the top; top-k from the hits in "
        "both galleries together, and in both stacked to one (mixed)",
    )


def open_evaluation(arguments):
    return Evaluation(
        arguments.data_path,
        arguments.subset,
        arguments.cache_dir,
        arguments.batch_size,
        arguments.workers,
        arguments.skip_bad_images,
        arguments.force_reload,
        input_scale=arguments.input_scale,
    )
