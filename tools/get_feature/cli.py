"""Shared by the scripts of this directory: their arguments, and the extraction of the features that they read."""

import argparse
import contextlib
import os
import pathlib
import re
import shlex

import backbones
from core import distributed
from core.agreement import check_ranks_agree, check_same_start, check_shared, failing_together
from core.config import REPO, expand, load_config
from core.files import lock
from core.manifest import ManifestError, digest, read_manifest
from dataset import open_train_set
from engine.extract import extract_features
from old_model.feature_set import OWN, SETS, FeatureError, FeatureSet


def make_parser(description):
    """The arguments that the tools of this directory share."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [config] --SD SD [options] [--key value ...]",
        description=description,
        epilog="config: an old model's config, whose model.pt embeds the images unless that is done; tools that only "
        "read features\ndo without it. Any of its keys can be overridden: --batch_size 256 --num_workers 8.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--SD", required=True, help="<old model>_<set>, such as f128_r18_softmax_class70, or any name")
    parser.add_argument(
        "--feature_save", type=expand, help="output directory (default: feature_save/ beside work_dirs/)"
    )
    parser.add_argument("-f", "--force", action="store_true", help="extract even if the features are up to date")
    parser.add_argument(
        "--unfinished", choices=["True", "False"], default="False", help="True: take the model of an unfinished run"
    )
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def parse(parser, argv=None):
    """`(args, cfg, files)`; cfg is None without a config. Raises ConfigError or FeatureError."""
    # Not a positional argument: argparse would take the value of an unknown option, a config's key, for it.
    args, words = parser.parse_known_args(argv)
    args.config = words.pop(0) if words and not words[0].startswith("-") else None
    outside = getattr(args, "model", None) or getattr(args, "features", None)
    if args.config is None and not outside:
        if words:
            parser.error(f"{' '.join(words)}: no config to override; give it first")
        return args, None, FeatureSet(args.SD, args.feature_save)
    if getattr(args, "network", None) and not outside:
        words += ["--network", args.network]
    cfg = load_config(args.config or REPO / "configs" / "base.py", words)
    files = FeatureSet(args.SD, args.feature_save or pathlib.Path(cfg.workspace) / "feature_save")
    rec_given = any(re.match("--rec(=|$)", word) for word in words)
    if rec_given and files.set and cfg.rec.endswith(".rec") and pathlib.Path(cfg.rec).name != files.record:
        raise FeatureError(
            f"--SD {files.name}: names {files.record}, --rec {cfg.rec} another; give --rec its directory, or drop the "
            f"set from --SD: the files then go to feature_save/{OWN}/"
        )
    if files.set is None and not (cfg.scenario or rec_given):
        raise FeatureError(
            f"--SD {files.name}: names none of the sets {', '.join(SETS)}; say with --rec FILE or --scenario NAME "
            "which images it is of"
        )
    if not outside:
        check_name(cfg, files)
    return args, cfg, files


def check_name(cfg, files):
    """A name that is another config's would put wrong features into that one's runs."""
    own = re.fullmatch(r"(.+)_((class|data)\d+)", cfg.name)
    old_model = own[1] if own else cfg.name
    if files.old_model != old_model:
        if not files.names_a_config():
            if files.set and os.environ.get("RANK", "0") == "0":
                print(f"note: --SD {files.name} names {files.old_model}, but the model is that of {cfg.config_file}")
            return
        raise FeatureError(
            f"--SD {files.name}: names another model; for {cfg.config_file} use --SD {old_model}_{files.set}"
        )
    # Models trained on 30 % of the classes and on 30 % of each class have otherwise the same name.
    if own and own[2] in ("class30", "data30") and not files.set.startswith(own[3]):
        raise FeatureError(
            f"--SD {files.name}: {cfg.name} was trained on {own[2]}; "
            f"use --SD {old_model}_{own[3]}70 or {old_model}_{own[3]}100"
        )


def record_path(cfg, files):
    """The record file of the set that --SD names, in the same directory as the config's `rec`."""
    if cfg.rec == "synthetic":
        raise FeatureError(f"{cfg.config_file}: rec = synthetic has no images to embed; set rec to a record file")
    rec = pathlib.Path(cfg.rec)
    if files.record is None:
        return rec  # named by --rec or the scenario
    is_file = rec.suffix == ".rec" or rec.is_file() or rec.with_name(f"{rec.name}.rec").is_file()
    path = (rec.parent if is_file else rec) / files.record
    if path.is_file():
        return path
    if files.record == "train.rec":
        place = "give --rec FILE or its directory" if cfg.name == "base" else f"set rec in {cfg.config_file}"
        raise FeatureError(
            f"{path}: no such file; put MS1M-V3's train.rec and train.idx, as published by insightface, there, "
            f"or, if they are elsewhere, {place}"
        )
    raise FeatureError(
        f"{path}: no such file; run: python tools/split_dataset/split_dataset_ms1mv3.py --root {path.parent}"
    )


def why_redo(files, model_path, train_set, expected):
    """Why the features of `files` must be extracted (again), or None if they are this model's of this record set.

    expected: what their manifest must say beside that. Files without a manifest are somebody's own, and kept.
    """
    for path in (files.feature, files.label):
        if not path.is_file():
            return f"{path}: no such file yet"
    try:
        features, labels = read_manifest(files.feature, ""), read_manifest(files.label, "")
    except ManifestError as error:
        return str(error).partition(";")[0]
    for manifest in filter(None, (features, labels)):
        if manifest.get("records") != train_set.digest():
            return f"{manifest.path}: made from another record set than {train_set.path}"
    if features and model_path.is_file() and features.get("model") != digest(model_path):
        return f"{files.feature}: made from another model than {model_path}"
    for key, value in expected.items():
        if features and features.get(key) != value:
            return f"{files.feature}: made with {key} = {features.get(key)}, not {value}"


def extract(cfg, files, args):
    """Write the features and labels of `files` with the model of `cfg`, unless up to date; call it on all ranks.

    args: of `parse`; force and unfinished are used.
    """
    model_path = pathlib.Path(cfg.output) / "model.pt"
    _, _, device = distributed.init_distributed()
    check_same_start(cfg, device, SD=files.name, force=args.force, unfinished=args.unfinished)
    with failing_together():
        rec = record_path(cfg, files)
        train_set = open_train_set(rec)
        records, model_digest = train_set.digest(), digest(model_path) if model_path.is_file() else None
    check_ranks_agree(records=records, model=model_digest)
    expected = {"network": cfg.network, "width": cfg.embedding_size}
    reason = "-f" if args.force else why_redo(files, model_path, train_set, expected)
    reason = distributed.gather_objects(reason)[0]  # rank 0 decides: the others may not yet see the newest files
    if reason is None:
        say(f"{files.feature}: kept, it is of {model_path} and {rec}; -f extracts it again")
        return
    say(f"extracting: {reason}")
    with failing_together():
        model = _load_model(cfg, model_path, device, args.unfinished == "True")
    with locked(files):
        extract_features(
            model,
            train_set,
            files.feature,
            files.label,
            embedding_size=cfg.embedding_size,
            batch_size=cfg.batch_size,
            num_workers=cfg.num_workers,
            made_from={"model": model_digest, "network": cfg.network},
        )
    say(f"wrote {files.feature}, of {rec}")


def _load_model(cfg, path, device, unfinished):
    if not path.is_file():
        script = "train_old_softmax.py" if "softmax" in cfg.name else "train_old_arc.py"
        raise FeatureError(
            f"{path}: no such file; train the model first: python {script} {cfg.config_file}{workspace(cfg)}"
        )
    manifest = read_manifest(path, "train the model again")
    if manifest.get("finished") is False and not unfinished:
        raise FeatureError(
            f"{path}: of an unfinished run, after step {manifest.get('step')}; finish it with --resume True, or take "
            "the model as it is with --unfinished True"
        )
    for name, key in (("network", "network"), ("width", "embedding_size")):
        if manifest.get(name, cfg[key]) != cfg[key]:
            raise FeatureError(
                f"{path}: trained with {key} = {manifest[name]}, not {cfg[key]}; correct it in {cfg.config_file}"
            )
    model = backbones.load_backbone(path, cfg.network, device)
    if model.num_features != cfg.embedding_size:
        raise FeatureError(
            f"{path}: gives {model.num_features} features, but embedding_size is {cfg.embedding_size}; "
            f"correct it in {cfg.config_file}"
        )
    return model


@contextlib.contextmanager
def locked(files):
    """Hold the lock of a feature set on rank 0; raises on all ranks if another run has it, or if some do not see it."""
    held = None
    with failing_together():
        if distributed.is_main():
            files.feature.parent.mkdir(parents=True, exist_ok=True)
            held = lock(files.feature.with_name(f".{files.name}.lock"))
    try:
        check_shared(files.feature.parent, "set --feature_save to a directory on a disk that all machines share")
        yield
    finally:
        if held:
            held.close()


def workspace(cfg):
    """The --workspace option of a command for this run's files; empty if they are under the repo root."""
    return "" if pathlib.Path(cfg.workspace) == REPO else f" --workspace {shlex.quote(cfg.workspace)}"


def say(line):
    if distributed.is_main():
        print(line, flush=True)
