"""Can this model be shipped? Criterion, update gain, the deployed threshold, the refresh of the gallery, who loses.

    python tools/ijbc_eval/compat_report.py --old work_dirs/old/model.pt --old_net r18 \\
        --new MixBCT=work_dirs/a/model.pt:r50 --new BCT=work_dirs/b/model.pt:r50 \\
        --independent r50=work_dirs/c/model.pt:r50 -d IJB_release --out report

Writes report.md, report.csv, report.json, calibration.csv and the plots models, thresholds and backfill (PNG and PDF)
to --out and prints a table. Embeddings are cached and shared with ijbc_eval.py.

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
from tools.ijbc_eval import compat_plots, compat_text, flips, refresh
from tools.ijbc_eval.comparison import Comparison, criterion
from tools.ijbc_eval.files import EvalError, check_writable, writing
from tools.ijbc_eval.options import add_data_arguments, open_evaluation, split_name, whole_number, with_preprocessing
from tools.ijbc_eval.thresholds import read_cohorts


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--old", required=True, metavar="MODEL", help="the model that embedded the gallery")
    add("--old_net", metavar="NET", help="its backbone, e.g. r18 (default: found by its keys)")
    add("--new", action="append", required=True, metavar="NAME=MODEL[:NET]", help="a new model; repeat for more")
    add("--independent", metavar="[NAME=]MODEL[:NET]", help="a new model trained without the old one: the ceiling")
    help_new_net = "backbone of new and independent models given without NET (default: found by their keys)"
    add("--new_net", metavar="NET", help=help_new_net)
    help_adapter = (
        "a map of fit_adapter.py for the queries of MODEL, one of the names above: a row of the report, and one of the "
        "midpoints of mapped and old queries; repeat for more"
    )
    add("--adapter", action="append", default=[], metavar="[NAME=]MAP@MODEL", help=help_adapter)
    add_data_arguments(parser)
    add("--fpr", type=float, default=1e-4, help="FPR at which 1:1 TPR is compared (default: 1e-4)")
    add("--fpir", type=float, default=1e-2, help="FPIR at which 1:N TPIR is compared (default: 1e-2)")
    help_bootstrap = "resamples of the 95 %% intervals (default: 1000); 0: none, the criterion by the figures alone"
    add("--bootstrap", type=whole_number(0), default=1000, metavar="N", help=help_bootstrap)
    help_threshold = "the deployed threshold, a cosine (default: that of --fpr on old/old)"
    add("--threshold", type=float, metavar="T", help=help_threshold)
    help_cohorts = "error rates by group: a text file with a line `subject group` for each SUBJECT_ID"
    add("--cohorts", type=expand, metavar="FILE", help=help_cohorts)
    help_order = (
        "order in which the gallery is re-embedded; repeat for more: random, dispersion (templates whose images differ "
        "most first), or a text file with every gallery template id, one per line, in this order or each with a "
        "number, the largest first (default: random and dispersion)"
    )
    add("--order", action="append", metavar="{random,dispersion,[NAME=]FILE}", help=help_order)
    add("--flips", type=expand, metavar="FILE.csv", help="write the queries that a new model loses, with images")
    add("--seed", type=whole_number(0), default=0, help="seed of resamples, halves and random order (default: 0)")
    out = pathlib.Path("compat_report")
    add("--out", type=expand, default=out, help="directory of the report (default: compat_report)")
    arguments = parser.parse_args(argv)
    for name in ("fpr", "fpir"):
        if not 0 < getattr(arguments, name) <= 1:
            parser.error(f"--{name} must be above 0 and at most 1")
    if arguments.threshold is not None and not -1 <= arguments.threshold <= 1:
        parser.error("--threshold must be a cosine, from -1 to 1")
    arguments.order = arguments.order or list(refresh.KINDS)
    return arguments


def parse_model(text, network):
    """`NAME=MODEL[:NET]` -> (name, ModelFile); without NAME= the name comes from the file."""
    name, file = split_name(text)
    path, colon, ending = file.rpartition(":")
    if colon and ending and "/" not in ending and "." not in ending:
        file, network = path, ending
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
    evaluation.read_lists()  # lists, files and models first, so that mistakes show before hours of embedding
    cohorts = read_cohorts(arguments.cohorts, evaluation.subjects[0]) if arguments.cohorts else None
    for _, model in news:
        evaluation.check_widths(old[1], model)
    if independent:
        evaluation.store.width(independent[1])
    for _, adapter, model in adapters:
        adapter.require(model.paths[0], old[1].paths[0])
        widths = evaluation.store.width(model), evaluation.store.width(old[1])
        if adapter.matrix.shape != widths:
            raise EvalError(
                f"{adapter.path}: maps width {' to '.join(map(str, adapter.matrix.shape))}, but {model.file} and "
                f"{old[1].file} have {widths[0]} and {widths[1]}; fit a map to their features with fit_adapter.py"
            )
    orders = refresh.read_orders(evaluation, arguments.order, arguments.seed, old[1])
    comparison = Comparison(evaluation, old[1], arguments, cohorts, orders)
    report = {"data": describe(arguments, evaluation, comparison.deployed, cohorts)}
    models = dict([old, *news, *([independent] if independent else [])])
    report["data"]["preprocessing"] = {name: str(evaluation.store.preprocessing(one)) for name, one in models.items()}
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


def describe(arguments, evaluation, deployed, cohorts):
    """The data and settings of the figures."""
    probes, galleries = evaluation.probes, evaluation.galleries
    absent = [~np.isin(probes.subject, gallery.subject) for gallery in galleries.values()]
    held_out = deployed.pools["held out"].rows
    return {
        "subset": arguments.subset,
        "fpr": arguments.fpr,
        "fpir": arguments.fpir,
        "protocol": arguments.protocol,
        "input_scale": arguments.input_scale,
        "bootstrap": arguments.bootstrap,
        "seed": arguments.seed,
        "subjects": len(evaluation.subjects[0]),
        "images": len(evaluation.faces.names),
        "templates": len(evaluation.faces.template_ids),
        "genuine_pairs": int(evaluation.pairs.label.sum()),
        "impostor_pairs": int((~evaluation.pairs.label).sum()),
        "probe_templates": len(probes.template),
        "non_mated_probes": int(min(map(np.count_nonzero, absent))),
        "probes_in_no_gallery": int(np.count_nonzero(np.logical_and.reduce(absent))),
        "gallery_templates": {name: len(gallery.template) for name, gallery in galleries.items()},
        "percent": list(refresh.STEPS),
        "threshold": deployed.threshold,
        "threshold_given": arguments.threshold is not None,
        "threshold_claimed": bool(deployed.claimed),
        "impostors_fitted": len(deployed.fitted),
        "impostors_held_out": len(held_out["fmr"]),
        "genuine_held_out": len(held_out["fnmr"]),
        "grid": deployed.grid.tolist(),
        "without_cohort": int(np.count_nonzero(cohorts[1] < 0)) if cohorts else 0,
    }


def without_nan(value):
    """Replace NaN by None, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def main(argv=None):
    arguments = parse_arguments(argv)
    old = ModelFile(arguments.old, arguments.old_net)
    news = [parse_model(text, arguments.new_net) for text in arguments.new]
    independent = parse_model(arguments.independent, arguments.new_net) if arguments.independent else None
    fed = with_preprocessing(arguments, {**dict([*news, *([independent] if independent else [])]), "old": old})
    old, news = fed["old"], [(name, fed[name]) for name, _ in news]
    independent = independent and (independent[0], fed[independent[0]])
    known = dict([*news, *([independent] if independent else [])])
    adapters = [parse_adapter(text, known) for text in arguments.adapter]
    names = [name for name, *_ in [*news, *adapters]]
    if len(set(names)) < len(names):
        raise EvalError(f"--new: two models are named {max(names, key=names.count)!r}; give each its own NAME=MODEL")
    evaluation = open_evaluation(arguments)
    for path in (arguments.out / "report.json", *([arguments.flips] if arguments.flips else [])):
        check_writable(path)
    report, comparison = compare(evaluation, (old.name, old), news, independent, adapters, arguments)
    bad = evaluation.bad_images(old, *(model for _, model in news), *([independent[1]] if independent else []))
    report = without_nan({**report, "bad_images": bad.tolist()})
    compat_plots.plot_all(report, arguments.out)
    texts = {
        arguments.out / "report.json": json.dumps(report, indent=2) + "\n",
        arguments.out / "report.md": compat_text.markdown(report),
        arguments.out / "report.csv": compat_text.as_csv(report),
        arguments.out / "calibration.csv": compat_text.maps_as_csv(comparison.maps),
    }
    if arguments.flips:
        texts[arguments.flips] = compat_text.csv_text([flips.COLUMNS, *comparison.lost])
    for path, text in texts.items():
        with writing(path) as file:
            file.write(text.encode())
    print(compat_text.terminal(report))
    print(f"report: {arguments.out / 'report.md'}")


if __name__ == "__main__":
    with report_errors():
        main()
