"""Can this model be shipped? Self-tests, cross-tests, compatibility criterion, update gain and backfill curve.

    python tools/ijbc_eval/compat_report.py --old work_dirs/old/model.pt --old_net r18 \\
        --new MixBCT=work_dirs/a/model.pt:r50 --new BCT=work_dirs/b/model.pt:r50 \\
        --independent r50=work_dirs/c/model.pt:r50 -d IJB_release --out report

Writes report.json, report.md, models.png and backfill.png to --out and prints a table. Embeddings are cached and shared
with ijbc_eval.py.

Criterion (BCT, Shen et al., CVPR 2020): M(new query, old gallery) > M(old, old), here in both the 1:1 TPR at --fpr and
the 1:N TPIR at --fpir. Update gain, from the same paper: (M(new, old) − M(old, old)) / (M(independent, independent) −
M(old, old)), the share of the gain of an incompatible update with a re-embedded gallery.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from core.config import expand
from core.errors import report_errors
from tools.ijbc_eval import compat_text, metrics, plots
from tools.ijbc_eval.ascii_table import is_number
from tools.ijbc_eval.files import EvalError, check_writable, writing
from tools.ijbc_eval.metrics import mean_top, mean_tpir
from tools.ijbc_eval.models import ModelFile
from tools.ijbc_eval.options import add_data_arguments, open_evaluation, whole_number

TOPS = (1, 5)
STEPS = tuple(range(0, 101, 10))  # shares of the gallery re-embedded, in %


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--old", required=True, metavar="MODEL", help="the model that embedded the gallery")
    add("--old_net", metavar="NET", help="its backbone, e.g. r18 (default: found by its keys)")
    add("--new", action="append", required=True, metavar="NAME=MODEL[:NET]", help="a new model; repeat for more")
    add("--independent", metavar="[NAME=]MODEL[:NET]", help="a new model trained without the old one: the ceiling")
    help_new_net = "backbone of new and independent models given without NET (default: found by their keys)"
    add("--new_net", metavar="NET", help=help_new_net)
    add_data_arguments(parser)
    add("--fpr", type=float, default=1e-4, help="FPR at which 1:1 TPR is compared (default: 1e-4)")
    add("--fpir", type=float, default=1e-2, help="FPIR at which 1:N TPIR is compared (default: 1e-2)")
    add("--seed", type=whole_number(0), default=0, help="seed of the random backfill order (default: 0)")
    help_order = "backfill order: a text file with every gallery template id, one per line"
    add("--order", type=expand, metavar="FILE", help=help_order)
    out = pathlib.Path("compat_report")
    add("--out", type=expand, default=out, help="directory of the report (default: compat_report)")
    arguments = parser.parse_args(argv)
    for name in ("fpr", "fpir"):
        if not 0 < getattr(arguments, name) <= 1:
            parser.error(f"--{name} must be above 0 and at most 1")
    return arguments


def parse_model(text, network):
    """`NAME=MODEL[:NET]` -> (name, ModelFile); without NAME= the name comes from the file.

    A path may contain "=" too (runs/lr=0.1/model.pt), so the text before the first one is a name only without "/".
    """
    name, equals, file = text.partition("=")
    if not equals or "/" in name:
        name, file = "", text
    path, colon, ending = file.rpartition(":")
    if colon and ending and "/" not in ending and "." not in ending:
        file, network = path, ending
    model = ModelFile(file, network)
    return name or model.name, model


@dataclasses.dataclass(frozen=True)
class Reading:
    """The rates at which 1:1 TPR and 1:N TPIR are compared, and the protocol of all figures."""

    fpr: float
    fpir: float
    protocol: str = "exact"


def measure(evaluation, gallery_model, probe_model, reading):
    """The figures of one test as a dict of floats; `gallery_model` embeds the gallery and the first of each pair."""
    protocol = reading.protocol
    fprs = [reading.fpr]
    roc = metrics.Roc(evaluation.verify(gallery_model, probe_model), evaluation.pairs.label, fprs)
    searches = evaluation.identify(gallery_model, probe_model)
    figures = {
        "tpr": roc.tpr_at(reading.fpr, protocol),
        "auc": roc.auc,
        **identification_figures(searches, reading),
        "tpr_at": {f"{point:g}": roc.tpr_at(point, protocol) for point in metrics.FPRS},
        "tpir_at": {f"{point:g}": mean_tpir(searches, point, protocol) for point in metrics.FPIRS},
    }
    if protocol == "published":
        rank = evaluation.identify_mixed(gallery_model, probe_model)
        figures |= {f"mixed_top{k}": metrics.pooled_top(rank, k) for k in TOPS}
    return figures


def identification_figures(searches, reading):
    tops = {f"top{k}": mean_top(searches, k, reading.protocol) for k in TOPS}
    return {"tpir": mean_tpir(searches, reading.fpir, reading.protocol), **tops}


def backfill(evaluation, old, new, order, reading):
    """1:N with the first 0, 10, … 100 % of the gallery templates in `order` (rows of template_ids) re-embedded.

    Probes are always the new model's: 0 % is the cross-test, 100 % the new model's self-test.
    """
    probes, gallery = evaluation.templates(new), evaluation.templates(old).copy()
    curve = {"percent": list(STEPS), "tpir": [], "top1": []}
    for percent in STEPS:
        done = order[: round(len(order) * percent / 100)]
        gallery[done] = probes[done]
        figures = identification_figures(evaluation.identify_in(gallery, probes), reading)
        for key in ("tpir", "top1"):
            curve[key].append(figures[key])
    return curve


def backfill_order(evaluation, seed, path=None):
    """Rows of template_ids of all gallery templates, in the file's order or shuffled by the seed."""
    rows = np.unique(np.concatenate([gallery.template for gallery in evaluation.galleries.values()]))
    if path is None:
        return np.random.default_rng(seed).permutation(rows)
    row_of = {int(evaluation.faces.template_ids[row]): row for row in rows}
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{path}: cannot be read ({error}); --order takes a text file of template ids") from None
    order = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            template = int(line) if is_number(line.strip()) else None
            if template not in row_of or template in order:
                problem = "is listed twice" if template in order else "is not a gallery template"
                raise EvalError(f"{path} line {number}: {line.strip()[:40]!r} {problem}; correct the line")
            order[template] = row_of[template]
    if len(order) < len(rows):
        absent = next(template for template in row_of if template not in order)
        raise EvalError(f"{path}: lists {len(order)} of {len(rows)} gallery templates; add {absent} and the others")
    return np.array(list(order.values()))


def compare(evaluation, old, news, independent, reading, order):
    """The whole report as a JSON-serialisable dict; old, news and independent are (name, ModelFile) or None."""
    evaluation.read_lists()  # lists and model files first, so that mistakes show before hours of embedding
    for _, model in news:
        evaluation.check_widths(old[1], model)
    if independent:
        evaluation.store.width(independent[1])
    base, ceiling = measure(evaluation, old[1], old[1], reading), None
    measured = {"old": {"name": old[0], "file": old[1].file, "self": base}}
    if independent:
        name, model = independent
        ceiling = measure(evaluation, model, model, reading)
        measured["independent"] = {"name": name, "file": model.file, "self": ceiling}
        if evaluation.store.width(model) == evaluation.store.width(old[1]):
            measured["independent"]["cross"] = measure(evaluation, old[1], model, reading)
    measured["new"] = []
    for name, model in news:
        cross = measure(evaluation, old[1], model, reading)
        holds = {key: cross[key] > base[key] for key in ("tpr", "tpir")}
        gain = {key: update_gain(cross[key], base[key], ceiling and ceiling[key]) for key in ("tpr", "tpir")}
        measured["new"].append(
            {
                "name": name,
                "file": model.file,
                "self": measure(evaluation, model, model, reading),
                "cross": cross,
                "criterion": holds,
                "compatible": all(holds.values()),
                "update_gain": gain,
                "backfill": backfill(evaluation, old[1], model, order, reading),
            }
        )
    return measured


def update_gain(cross, base, ceiling):
    """BCT's update gain; None without an independent model or if that is no better than the old one."""
    return (cross - base) / (ceiling - base) if ceiling is not None and ceiling > base else None


def describe(arguments, evaluation):
    """The data and settings of the figures."""
    probes, galleries = evaluation.probes, evaluation.galleries
    absent = [~np.isin(probes.subject, gallery.subject) for gallery in galleries.values()]
    return {
        "subset": arguments.subset,
        "fpr": arguments.fpr,
        "fpir": arguments.fpir,
        "protocol": arguments.protocol,
        "input_scale": arguments.input_scale,
        "images": len(evaluation.faces.names),
        "templates": len(evaluation.faces.template_ids),
        "genuine_pairs": int(evaluation.pairs.label.sum()),
        "impostor_pairs": int((~evaluation.pairs.label).sum()),
        "probe_templates": len(probes.template),
        "non_mated_probes": int(min(map(np.count_nonzero, absent))),
        "probes_in_no_gallery": int(np.count_nonzero(np.logical_and.reduce(absent))),
        "gallery_templates": {name: len(gallery.template) for name, gallery in galleries.items()},
        "backfill_order": str(arguments.order) if arguments.order else f"seed {arguments.seed}",
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
    names = [name for name, _ in news]
    if len(set(names)) < len(names):
        raise EvalError(f"--new: two models are named {max(names, key=names.count)!r}; give each its own NAME=MODEL")
    independent = parse_model(arguments.independent, arguments.new_net) if arguments.independent else None
    evaluation = open_evaluation(arguments)
    order = backfill_order(evaluation, arguments.seed, arguments.order)
    check_writable(arguments.out / "report.json")
    reading = Reading(arguments.fpr, arguments.fpir, arguments.protocol)
    models = compare(evaluation, (old.name, old), news, independent, reading, order)
    bad = evaluation.bad_images(old, *(model for _, model in news), *([independent[1]] if independent else []))
    report = without_nan({"data": describe(arguments, evaluation), **models, "bad_images": bad.tolist()})
    plots.plot_models(report, arguments.out / "models.png")
    plots.plot_backfill(report, arguments.out / "backfill.png")
    texts = {"report.json": json.dumps(report, indent=2) + "\n", "report.md": compat_text.markdown(report)}
    for name, text in texts.items():
        with writing(arguments.out / name) as file:
            file.write(text.encode())
    print(compat_text.terminal(report))
    print(f"report: {arguments.out / 'report.md'}")


if __name__ == "__main__":
    with report_errors():
        main()
