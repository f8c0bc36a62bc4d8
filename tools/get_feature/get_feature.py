"""Embed a training set with a trained old model and write the features to feature_save/.

    python tools/get_feature/get_feature.py configs/f128_r18_softmax_class30.py --SD f128_r18_softmax_class70
    python tools/get_feature/get_feature.py --model prod.onnx --bgr --SD prod --rec dataset/mine
    python tools/get_feature/get_feature.py --features f.npy --paths p.txt --SD prod --rec dataset/mine

The last part of --SD may say which set to embed: class30, class70, class100, data30, data70 or data100; its record file
is expected in the directory of the config's `rec`. The part before it is the config's name without its own set, so that
file names say which old model made them. Any other name takes the record file of --rec or --scenario. Writes

    feature_save/{EXclass,EXdata,OPclass,OPdata,own}/<SD>_feature.npy   float32 [N, D], in record order, never flipped
                                                     <SD>_label.npy     int64 [N]

each with its manifest; `own` for names without a set. A config or scenario names them by old_embedding. Stored features
are put into record order: by --paths, lines as in the images.txt that folder_to_rec.py writes beside the record file;
or by --labels, which must already be in it. An image without a feature gets a row of zeros: no old-side term.

Under torchrun or torch.distributed.launch each rank embeds its own rows. Files that are this model's of this record
file, by their manifests, are kept; otherwise it says why they are extracted again.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from core import distributed
from core.agreement import check_ranks_agree, check_same_start, failing_together
from core.errors import report_errors
from dataset import open_train_set
from old_model.feature_set import FeatureError
from tools.get_feature import outside
from tools.get_feature.cli import extract, locked, make_parser, parse, record_path, say, why_redo


def extract_outside(args, cfg, files):
    """Write the features and labels of `files` with --model, unless up to date; call it on all ranks."""
    _, _, device = distributed.init_distributed()
    check_same_start(cfg, device, SD=files.name, force=args.force)
    with failing_together():
        train_set = open_train_set(record_path(cfg, files))
        facts, model_file = outside.made_with(args)
        records = train_set.digest()
    check_ranks_agree(**facts, records=records)
    stated = {key: facts[key] for key in ("network", "preprocessing")}
    reason = "-f" if args.force else why_redo(files, model_file.paths[0], train_set, stated)
    reason = distributed.gather_objects(reason)[0]  # rank 0 decides
    if reason is None:
        say(f"{files.feature}: kept, it is of {args.model} and {train_set.path}; -f extracts it again")
        return
    say(f"extracting, {model_file.preprocessing}: {reason}")
    with locked(files):
        outside.embed(model_file, facts, train_set, files, cfg, device)
    say(f"wrote {files.feature}, of {train_set.path}")


def import_stored(args, cfg, files):
    """Write the features and labels of `files` from --features."""
    distributed.init_distributed()
    if distributed.world_size() > 1:
        raise FeatureError("--features: one process puts stored features in order; start it with python")
    with locked(files):
        train_set = open_train_set(record_path(cfg, files))
        outside.take_stored(args, train_set, files)
    say(f"wrote {files.feature}, of {train_set.path}")


def main(argv=None):
    parser = make_parser(__doc__)
    outside.add_arguments(parser)
    with report_errors():
        args, cfg, files = parse(parser, argv)
        if [args.config, args.model, args.features].count(None) != 2:
            parser.error("give a config, --model or --features, one of the three")
        if args.features and (args.labels is None) == (args.paths is None):
            parser.error("--features: give --labels or --paths, too")
        if args.config:
            extract(cfg, files, args)
        else:
            (extract_outside if args.model else import_stored)(args, cfg, files)
    distributed.shutdown()


if __name__ == "__main__":
    main()
