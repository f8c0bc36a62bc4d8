"""1:1 verification and 1:N identification of a model, or of a new model against an old one's gallery: on IJB-B and
IJB-C, or on pairs, folders and .bin files of one's own.

    python tools/ijbc_eval/ijbc_eval.py -m work_dirs/new/model.pt -net r50 -d IJB_release          (self-test, 1:1)
    python tools/ijbc_eval/ijbc_eval.py -m new.pt -net r50 -m_old old.pt -old_net r18 -d IJB_release -N
                                                                                                   (cross-test, 1:N)
    python tools/ijbc_eval/ijbc_eval.py -m new.pt --bin lfw.bin                               (or --pairs pairs.txt .)
    python tools/ijbc_eval/ijbc_eval.py -m new.pt -m_old gallery.npy --old_labels people.txt --probe probe
                                                                              (cross-test, 1:N, with a stored gallery)
    python tools/ijbc_eval/ijbc_eval.py -P MixBCT=IJB_result/a_IJBC_11.npz BCT=IJB_result/b_IJBC_11.npz
                                                                                                   (saved results)

In a cross-test the old model embeds the gallery and the first template of each 1:1 pair, the new model the probes and
the second template. TPR at a given FPR is the largest TPR whose FPR does not exceed it, with exact ties; TPIR at a
given FPIR likewise; --protocol published computes both as the published scripts do.
"""

import argparse
import hashlib
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from backbones.model_files import ModelFile
from core.config import expand
from core.errors import report_errors
from tools.ijbc_eval import plots, results, stored
from tools.ijbc_eval.files import EvalError, check_writable
from tools.ijbc_eval.options import add_data_arguments, open_evaluation, open_old_side, split_name, with_preprocessing
from tools.ijbc_eval.templates import Setting


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-m", "--model_file", help="new model: x.pt / x.pth / x.safetensors, x.onnx, or MXNet's prefix,epoch")
    add("-net", "--network", help="backbone of the new model, e.g. r50 (default: found by the state dict's keys)")
    help_old = "old model, for a cross-test, or its stored features, x.npy with --old_labels"
    add("-m_old", "--old_model_file", "--model_file_old", help=help_old)
    add("-old_net", "--old_network", "--network_old", help="backbone of the old model, e.g. r18 (default: as for -net)")
    add_data_arguments(parser)
    add("-N", "--is_one_2_N", action="store_true", help="1:N instead of 1:1; the default where there are no pairs")
    help_bunch = "all eight settings N{0,1}D{0,1}F{0,1}: normalised embeddings, × detection score, + mirrored image"
    add("-B", "--is_bunch", action="store_true", help=help_bunch)
    help_result = (
        "result file, with the plots beside it (default: IJB_result/{model_name}_{subset}_{11|1N}.npz or, where the "
        "result of other models or images lies, that with six digits of their digests)"
    )
    add("-R", "--save_result", type=expand, help=help_result)
    help_embeddings = "add embs and embs_f to the result (cross-test: also embs_old, embs_f_old)"
    add("-E", "--save_embeddings", action="store_true", help=help_embeddings)
    help_label = "add the template ids (1:N: subject ids too) of each score; label is always saved"
    add("-L", "--save_label", action="store_true", help=help_label)
    help_plot = "tabulate and plot saved results, without a model, under names of your own or those in the files"
    add("-P", "--plot_only", nargs="+", metavar="[NAME=]NPZ", help=help_plot)
    arguments = parser.parse_args(argv)
    if not arguments.plot_only and not arguments.model_file:
        parser.error("give -m MODEL, or -P NPZ for saved results")
    return arguments


def evaluate(arguments):
    """Run the requested test; returns (path of the result file, result arrays)."""
    new = ModelFile(arguments.model_file, arguments.network)
    old, exact = None, None
    if arguments.old_model_file:
        old, exact = open_old_side(arguments, arguments.old_model_file, arguments.old_network)
    evaluation = open_evaluation(arguments, old)
    sides = {"new": new, **({"old": old} if old else {})}
    fed = with_preprocessing(arguments, sides, evaluation.store.input_scale)
    new, old = fed["new"], fed.get("old", fed["new"])
    one_to_n = asks_for_one_to_n(arguments, evaluation.set)
    for side in filter(None, (old, exact)):
        evaluation.check_widths(side, new)
    name = new.name if old == new else f"{new.name}_to_{old.name}"
    models = evaluation.store.digest(new)
    if old != new:
        models = hashlib.sha256(f"{models} {evaluation.store.digest(old)}".encode()).hexdigest()
    test = "1N" if one_to_n else "11"
    path = arguments.save_result
    if path is None:
        path = pathlib.Path("IJB_result") / f"{name}_{evaluation.set.name}_{test}.npz"
        path = results.free_path(path, models, evaluation.set.key)
    check_writable(path)
    settings = Setting.all() if arguments.is_bunch else [Setting()]
    runs = [(f"{name} {setting.name}" if arguments.is_bunch else name, old, setting) for setting in settings]
    runs += [(f"{name} float32", exact, Setting())] if exact else []
    result = (identify if one_to_n else verify)(evaluation, new, runs, arguments.protocol)
    result["models"], result["place"] = models, evaluation.set.key
    result["input_scale"] = evaluation.store.input_scale
    result["widths"] = np.array([evaluation.store.width(old), evaluation.store.width(new)])
    result["preprocessing"] = np.array([str(evaluation.store.preprocessing(model)) for model in (old, new)])
    result["bad_images"] = evaluation.bad_images(old, new)
    if exact:
        print(stored.said_of_loss(old, evaluation.templates(old), evaluation.templates(exact)))
    if arguments.save_embeddings:
        result |= embeddings(evaluation, old, new)
    if arguments.save_label:
        result |= origins(evaluation, one_to_n)
    return path, result


def asks_for_one_to_n(arguments, evaluation_set):
    """Whether to test 1:N: with -N, and where there are no pairs."""
    if arguments.is_one_2_N and not evaluation_set.has_gallery:
        raise EvalError(f"-N: {evaluation_set.name} has no gallery; give --gallery and --probe")
    return arguments.is_one_2_N or not evaluation_set.has_pairs


def verify(evaluation, new, runs, protocol):
    """The arrays of a 1:1 result; runs: (name, old side, Setting)."""
    scores = np.stack([evaluation.verify(old, new, setting) for _, old, setting in runs])
    names, of = [name for name, *_ in runs], evaluation.set
    return results.verification_result(names, scores, evaluation.pairs.label, of.name, protocol, of.fprs, of.folds)


def identify(evaluation, new, runs, protocol):
    """The arrays of a 1:N result; runs: (name, old side, Setting)."""
    searches = [evaluation.identify(old, new, setting) for _, old, setting in runs]
    mixed = [evaluation.identify_mixed(old, new, setting) for _, old, setting in runs]
    names, of, galleries = [name for name, *_ in runs], evaluation.set, list(evaluation.galleries)
    return results.identification_result(names, searches, mixed, of.name, galleries, protocol, of.fpirs)


def embeddings(evaluation, old, new):
    """-E: embeddings of all images and mirrored images, rows in the order of `image_names`."""
    found = evaluation.store.get(new)
    arrays = {"embs": found.embs, "embs_f": found.embs_f, "image_names": evaluation.faces.names.astype(str)}
    if old != new and not isinstance(old, stored.StoredFeatures):
        found = evaluation.store.get(old)
        arrays |= {"embs_old": found.embs, "embs_f_old": found.embs_f}
    return arrays


def origins(evaluation, one_to_n):
    """-L: the templates and subjects of each score."""
    ids = evaluation.faces.template_ids
    if not one_to_n:
        pairs = evaluation.pairs
        return {
            "first_template": ids[pairs.first_templates[pairs.first]],
            "second_template": ids[pairs.second_templates[pairs.second]],
        }
    arrays = {"probe_template": ids[evaluation.probes.template], "probe_subject": evaluation.probes.subject}
    for name, gallery in evaluation.galleries.items():
        template = gallery.template if evaluation.set.stored_gallery else ids[gallery.template]
        arrays |= {f"gallery_{name}_template": template, f"gallery_{name}_subject": gallery.subject}
    return arrays


def load_named(text, protocol):
    """The result file of `[NAME=]NPZ`; of several runs in it, each keeps its setting behind the name."""
    name, file = split_name(text)
    result = results.load(expand(file), protocol)
    if name:
        several = len(result["names"]) > 1
        result["names"] = np.array([f"{name} {run.rsplit(' ', 1)[-1]}" if several else name for run in result["names"]])
    return result


def show(tables_of, prefix):
    """Print tables and write plots of results, 1:1 and 1:N separately."""
    for task, plot in (("11", plots.plot_verification), ("1N", plots.plot_identification)):
        chosen = [result for result in tables_of if result["task"] == task]
        for result in chosen:
            print(results.tables(result))
        if chosen:
            for path in plot(chosen, prefix):
                print(f"plot: {path}")


def main(argv=None):
    arguments = parse_arguments(argv)
    if arguments.plot_only:
        prefix = arguments.save_result.with_suffix("") if arguments.save_result else pathlib.Path("IJB_result/compared")
        show([load_named(text, arguments.protocol) for text in arguments.plot_only], prefix)
        return
    path, result = evaluate(arguments)
    results.save(path, result)
    if len(result["bad_images"]):
        print(f"{len(result['bad_images'])} unusable images were left out; bad_images in the result lists them")
    show([result], path.with_suffix(""))
    print(f"result: {path}")


if __name__ == "__main__":
    with report_errors():
        main()
