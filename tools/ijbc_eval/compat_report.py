"""Can this model be shipped? Criterion, update gain, the deployed threshold, the refresh of the gallery, who loses.

    python tools/ijbc_eval/compat_report.py --old work_dirs/old/model.pt --old_net r18 \\
        --new MixBCT=work_dirs/a/model.pt:r50 --new BCT=work_dirs/b/model.pt:r50 \\
        --independent r50=work_dirs/c/model.pt:r50 -d IJB_release --out report
    python tools/ijbc_eval/compat_report.py --old old_features.npy --old_labels names.txt --new new.pt \\
        --pairs val/pairs.txt val --gallery val/gallery --probe val/probe
    python tools/ijbc_eval/compat_report.py --chain v1=a.pt v2=b.pt v3=c.pt --gallery val/gallery --probe val/probe

Writes report.md, report.csv, report.json, calibration.csv and the plots models, thresholds and backfill (PNG and PDF)
to --out and prints a table; of a set without pairs, or without a gallery, what there is. Embeddings are cached and
shared with ijbc_eval.py. --chain writes chain.md, chain.csv and chain.json: the matrix C[t][k] = M(query v_t, gallery
v_k), which pairs hold, t > k and C[t][k] > C[k][k], their share AC, the mean AM over t ≥ k, and a gallery that all
versions have written (chain.py).

Each --adapter, a map of tools/adapters/fit_adapter.py, is two rows beside the models: a query of MODEL mapped into the
old model's space, and its midpoint with the old query. A re-embedded gallery is that model's own.

Criterion (BCT, Shen et al., CVPR 2020): M(new query, old gallery) > M(old, old), here in both the 1:1 TPR at --fpr and
the 1:N TPIR at --fpir: yes, no or undecided by the 95 % interval of the difference (bootstrap.py). Update gain, from
the same paper: (M(new, old) − M(old, old)) / (M(independent, independent) − M(old, old)), the share of the gain of an
incompatible update with a re-embedded gallery.
"""

import argparse
import json
import math
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from backbones.model_files import ModelFile
from core.config import expand
from core.errors import report_errors
from tools.adapters.adapter import load_adapter, slerp
from tools.ijbc_eval import chain, compat_csv, compat_plots, compat_text, flips, refresh
from tools.ijbc_eval.comparison import Comparison, criterion, reading_of
from tools.ijbc_eval.evaluation_set import EvaluationSet
from tools.ijbc_eval.files import EvalError, check_writable, writing
from tools.ijbc_eval.options import (
    add_data_arguments,
    open_evaluation,
    open_old_side,
    split_name,
    whole_number,
    with_preprocessing,
)
from tools.ijbc_eval.own_set import CropSet
from tools.ijbc_eval.stored import StoredFeatures
from tools.ijbc_eval.thresholds import read_cohorts


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    help_old = "the model that embedded the gallery, or its stored features of all images, x.npy with --old_labels"
    add("--old", metavar="MODEL", help=help_old)
    add("--old_net", metavar="NET", help="its backbone, e.g. r18 (default: found by its keys)")
    help_new = "a new model, by default named after its file or folder; repeat for more"
    add("--new", action="append", default=[], metavar="[NAME=]MODEL[:NET]", help=help_new)
    add("--independent", metavar="[NAME=]MODEL[:NET]", help="a new model trained without the old one: the ceiling")
    help_new_net = "backbone of new and independent models given without NET (default: found by their keys)"
    help_chain = (
        "instead of all these: versions of one system, the oldest first: which search which galleries, and a gallery "
        "that all have written"
    )
    add("--chain", nargs="+", metavar="[NAME=]MODEL[:NET]", help=help_chain)
    add("--new_net", metavar="NET", help=help_new_net)
    help_adapter = (
        "a map of fit_adapter.py for the queries of MODEL, one of the names above: a row of the report, and one of the "
        "midpoints of mapped and old queries; repeat for more"
    )
    add("--adapter", action="append", default=[], metavar="[NAME=]MAP@MODEL", help=help_adapter)
    add_data_arguments(parser)
    help_fpr = f"FPR at which 1:1 TPR is compared (default: {EvaluationSet.fpr:g} on IJB, else {CropSet.fpr:g})"
    add("--fpr", type=float, help=help_fpr)
    help_fpir = f"FPIR at which 1:N TPIR is compared (default: {EvaluationSet.fpir:g})"
    add("--fpir", type=float, help=help_fpir)
    help_bootstrap = "resamples of the 95 %% intervals (default: 1000); 0: none, the criterion by the figures alone"
    add("--bootstrap", type=whole_number(0), default=1000, metavar="N", help=help_bootstrap)
    help_threshold = "the deployed threshold, a cosine (default: that of --fpr on old/old)"
    add("--threshold", type=float, metavar="T", help=help_threshold)
    help_cohorts = (
        "error rates by group: a text file with a line `subject group` for each SUBJECT_ID (own sets: "
        "`folder<TAB>group`)"
    )
    add("--cohorts", type=expand, metavar="FILE", help=help_cohorts)
    help_order = (
        "order in which the gallery is re-embedded; repeat for more: random, dispersion (templates whose images differ "
        "most first), or a text file with every gallery template id (own sets: image), one per line, in this order or "
        "each with a number, the largest first (default: random and dispersion)"
    )
    add("--order", action="append", metavar="{random,dispersion,[NAME=]FILE}", help=help_order)
    add("--flips", type=expand, metavar="FILE.csv", help="write the queries that a new model loses, with images")
    add("--seed", type=whole_number(0), default=0, help="seed of resamples, halves and random order (default: 0)")
    out = pathlib.Path("compat_report")
    add("--out", type=expand, default=out, help="directory of the report (default: compat_report)")
    arguments = parser.parse_args(argv)
    for name in ("fpr", "fpir"):
        rate = getattr(arguments, name)
        if rate is not None and not 0 < rate <= 1:
            parser.error(f"--{name} must be above 0 and at most 1")
    if arguments.threshold is not None and not -1 <= arguments.threshold <= 1:
        parser.error("--threshold must be a cosine, from -1 to 1")
    if arguments.chain:
        names = "old", "new", "independent", "adapter", "threshold", "cohorts", "order", "flips", "old_labels"
        given = [f"--{name}" for name in names if getattr(arguments, name) not in (None, [])]
        if given or len(arguments.chain) < 2:
            parser.error(f"--chain takes two or more versions and goes without {' '.join(given) or '--old and --new'}")
    elif not (arguments.old and arguments.new):
        parser.error("give --old MODEL and --new MODEL, or --chain")
    return arguments


def parse_model(text, network):
    """`[NAME=]MODEL[:NET]` -> (name, ModelFile); without NAME= the name comes from the file."""
    name, file = split_name(text)
    path, colon, ending = file.rpartition(":")
    if colon and ending and "/" not in ending and "." not in ending:
        file, network = path, ending
    elif ModelFile(file).kind != "torch":
        network = None  # --new_net is for the others
    model = ModelFile(file, network)
    return name or model.name, model


def parse_adapter(text, models):
    """`[NAME=]MAP@MODEL` -> (name, Adapter, ModelFile); models: {name: ModelFile}. EvalError for an unknown model."""
    name, rest = split_name(text)
    file, _, model = rest.rpartition("@")
    if not file or model not in models:
        raise EvalError(f"--adapter {text}: give [NAME=]MAP@MODEL with a MODEL of this report: {', '.join(models)}")
    adapter = load_adapter(expand(file))
    return name or f"{model} {adapter.path.stem}", adapter, models[model]


def compare(evaluation, old, news, independent, adapters, arguments):
    """`(report, Comparison)`: the whole report as a dict. old, news and independent (or None): (name, ModelFile);
    adapters: (name, Adapter, ModelFile)."""
    cohorts = None  # files and models first, so that mistakes show before hours of embedding
    if arguments.cohorts:
        cohorts = read_cohorts(arguments.cohorts, evaluation.subjects[0], evaluation.set.separator)
    for _, model in news:
        evaluation.check_widths(old[1], model)
    if independent:
        evaluation.store.width(independent[1])
    for _, adapter, model in adapters:
        adapter.require(model, old[1])
        widths = evaluation.store.width(model), evaluation.store.width(old[1])
        if adapter.matrix.shape != widths:
            raise EvalError(
                f"{adapter.path}: maps width {' to '.join(map(str, adapter.matrix.shape))}, but {model.file} and "
                f"{old[1].file} have {widths[0]} and {widths[1]}; fit a map to their features with fit_adapter.py"
            )
    evaluation.require_all_rows(old[1])
    orders = (
        refresh.read_orders(evaluation, arguments.order or refresh.KINDS, arguments.seed, old[1])
        if evaluation.probes
        else {}
    )
    comparison = Comparison(evaluation, old[1], arguments, cohorts, orders)
    report = {"data": describe(arguments, evaluation)}
    models = dict([old, *news, *([independent] if independent else [])])
    report["data"]["preprocessing"] = {name: str(evaluation.store.preprocessing(one)) for name, one in models.items()}
    report["data"]["rests_on"] = comparison.base.rests_on
    report["data"]["without_cohort"] = int(np.count_nonzero(cohorts[1] < 0)) if cohorts else 0
    if comparison.deployed:
        report["data"] |= describe_threshold(comparison.deployed, arguments.threshold is not None)
    report["old"] = {"name": old[0], "file": old[1].file, **comparison.of_old()}
    ceiling, report["new"] = None, []
    if independent:
        name, model = independent
        features = evaluation.templates(model)
        part, _, ceiling = comparison.assess(name, features, features)
        report["independent"] = {"name": name, "file": model.file, **part}
    for name, file, query, features in rows(evaluation, comparison.old, news, adapters):
        part, cross, _ = comparison.assess(name, query, features)
        report["new"].append({"name": name, "file": file, **part, **criterion(cross, comparison.base, ceiling)})
    return report, comparison


def rows(evaluation, old, news, adapters):
    """Yield `(name, file, query [T, D], features [T, D])` of each new model, then of each map both ways: the
    mapped query, and the midpoint of it and the old query on the sphere, for which both models run."""
    for name, model in news:
        yield name, model.file, evaluation.templates(model), evaluation.templates(model)
    for name, adapter, model in adapters:
        features = evaluation.templates(model)
        mapped = adapter.apply(features)
        yield name, str(adapter.path), mapped, features
        yield f"{name}, both models", str(adapter.path), slerp(mapped, old, 0.5), features


def describe(arguments, evaluation):
    """The data and settings of the figures; counts of 1:1 and 1:N where there are such."""
    data = {
        "subset": evaluation.set.name,
        "fpr": arguments.fpr,
        "fpir": arguments.fpir,
        "protocol": arguments.protocol,
        "input_scale": evaluation.store.input_scale,
        "bootstrap": arguments.bootstrap,
        "seed": arguments.seed,
        "subjects": len(evaluation.subjects[0]),
        "people_known": evaluation.set.people_known,
        "images": len(evaluation.faces.names),
        "templates": len(evaluation.faces.template_ids),
    }
    if evaluation.pairs:
        genuine = int(evaluation.pairs.label.sum())
        data |= {"genuine_pairs": genuine, "impostor_pairs": len(evaluation.pairs.label) - genuine}
    if evaluation.probes:
        nowhere = absent(evaluation)
        data |= {
            "probe_templates": len(evaluation.probes.template),
            "non_mated_probes": int(nowhere.sum(axis=1).min()),
            "probes_in_no_gallery": int(nowhere.all(axis=0).sum()),
            "gallery_templates": {name: len(one.template) for name, one in evaluation.galleries.items()},
            "percent": list(refresh.STEPS),
        }
    return data


def describe_threshold(deployed, given):
    """The deployed threshold, and what maps are fitted and judged on; given: whether --threshold sets it."""
    held_out = deployed.pools["held out"].rows
    return {
        "threshold": deployed.threshold,
        "threshold_given": given,
        "threshold_claimed": bool(deployed.claimed),
        "impostors_fitted": len(deployed.fitted),
        "impostors_held_out": len(held_out["fmr"]),
        "genuine_held_out": len(held_out["fnmr"]),
        "grid": deployed.grid.tolist(),
    }


def absent(evaluation):
    """bool [galleries, Q]: whose probe's person is not in the gallery."""
    subjects = evaluation.probes.subject
    return np.array([~np.isin(subjects, gallery.subject) for gallery in evaluation.galleries.values()])


def without_nan(value):
    """Replace NaN by None, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def run_chain(arguments):
    """--chain: write and print its report."""
    versions = [parse_model(text, arguments.new_net) for text in arguments.chain]
    check_names("--chain", versions)
    evaluation = open_for_report(arguments)
    versions = list(with_preprocessing(arguments, dict(versions), evaluation.store.input_scale).items())
    check_writable(arguments.out / "chain.json")
    for number, (_, query) in enumerate(versions):
        for _, gallery in versions[:number]:
            evaluation.check_widths(gallery, query)
    report = chain.chain_report(evaluation, versions, reading_of(evaluation, arguments))
    bad = evaluation.bad_images(*(model for _, model in versions))
    report = without_nan({"data": describe(arguments, evaluation), **report, "bad_images": bad.tolist()})
    texts = {"json": json.dumps(report, indent=2) + "\n", "md": chain.markdown(report), "csv": chain.as_csv(report)}
    write_texts({arguments.out / f"chain.{ending}": text for ending, text in texts.items()})
    print(chain.terminal(report))
    print(f"report: {arguments.out / 'chain.md'}")


def check_names(option, models):
    names = [name for name, *_ in models]
    if len(set(names)) < len(names):
        raise EvalError(f"{option}: two models are named {max(names, key=names.count)!r}; give each its own NAME=MODEL")


def write_texts(texts):
    """Write {path: text}."""
    for path, text in texts.items():
        with writing(path) as file:
            file.write(text.encode())


def main(argv=None):
    arguments = parse_arguments(argv)
    if arguments.chain:
        run_chain(arguments)
    else:
        run_report(arguments)


def run_report(arguments):
    """Everything but --chain: write and print the report."""
    old, exact = open_old_side(arguments, arguments.old, arguments.old_net)
    if isinstance(old, StoredFeatures) and arguments.probe and not arguments.gallery:
        raise EvalError(
            "--probe without --gallery: a report has M(old, old) and M(new, new), for which both sides' images are "
            "needed; a gallery that exists only as features is searched by ijbc_eval.py"
        )
    news = [parse_model(text, arguments.new_net) for text in arguments.new]
    independent = parse_model(arguments.independent, arguments.new_net) if arguments.independent else None
    evaluation = open_for_report(arguments)
    sides = {**dict([*news, *([independent] if independent else [])]), "old": old}
    fed = with_preprocessing(arguments, sides, evaluation.store.input_scale)
    old, news = fed["old"], [(name, fed[name]) for name, _ in news]
    independent = independent and (independent[0], fed[independent[0]])
    known = dict([*news, *([independent] if independent else [])])
    adapters = [parse_adapter(text, known) for text in arguments.adapter]
    check_names("--new", [*news, *adapters])
    for path in (arguments.out / "report.json", *([arguments.flips] if arguments.flips else [])):
        check_writable(path)
    report, comparison = compare(evaluation, (old.name, old), news, independent, adapters, arguments)
    if exact:
        report["stored"] = comparison.stored(old, exact, news)
    bad = evaluation.bad_images(old, *(model for _, model in news), *([independent[1]] if independent else []))
    report = without_nan({**report, "bad_images": bad.tolist()})
    compat_plots.plot_all(report, arguments.out)
    texts = {
        arguments.out / "report.json": json.dumps(report, indent=2) + "\n",
        arguments.out / "report.md": compat_text.markdown(report),
        arguments.out / "report.csv": compat_csv.as_csv(report),
    }
    if comparison.maps:
        texts[arguments.out / "calibration.csv"] = compat_csv.maps_as_csv(comparison.maps)
    if arguments.flips:
        texts[arguments.flips] = compat_csv.csv_text([flips.COLUMNS, *comparison.lost])
    write_texts(texts)
    print(compat_text.terminal(report))
    print(f"report: {arguments.out / 'report.md'}")


def open_for_report(arguments):
    """The Evaluation, and its rates in the arguments unless they are given."""
    evaluation = open_evaluation(arguments)
    for rate in ("fpr", "fpir"):
        if getattr(arguments, rate) is None:
            setattr(arguments, rate, getattr(evaluation.set, rate))
    evaluation.read_lists()  # first, so that mistakes show before hours of embedding
    if evaluation.probes and not absent(evaluation).any(axis=1).all():
        raise EvalError(
            f"{evaluation.set.name}: every probe is of a person in the gallery, so there is no FPIR; add probes of "
            "others"
        )
    return evaluation


if __name__ == "__main__":
    with report_errors():
        main()
