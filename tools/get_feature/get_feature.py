"""Embed a training set with a trained old model and write the features to feature_save/.

    python tools/get_feature/get_feature.py configs/f128_r18_softmax_class30.py --SD f128_r18_softmax_class70

The last part of --SD says which set to embed: class30, class70, class100, data30, data70 or data100; its record file is
expected in the directory of the config's `rec`. The part before it must be the config's name without its own set, so
that file names say which old model made them. Writes

    feature_save/{EXclass,EXdata,OPclass,OPdata}/<SD>_feature.npy   float32 [N, D], in record order, never flipped
                                                 <SD>_label.npy     int64 [N]

each with its manifest. Under torchrun or torch.distributed.launch each rank embeds its own rows. Files that are this
model's of this record file, by their manifests, are kept; otherwise it says why they are extracted again.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

from core import distributed
from core.errors import report_errors
from tools.get_feature.cli import extract, make_parser, parse


def main(argv=None):
    parser = make_parser(__doc__)
    with report_errors():
        args, cfg, files = parse(parser, argv)
        distributed.init_distributed()
        extract(cfg, files, args)
    distributed.shutdown()


if __name__ == "__main__":
    main()
