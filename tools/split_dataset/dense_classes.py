"""Renumber the classes of a training set whose labels leave gaps: 0, 1, 2, ... in the order of the old labels.

    python tools/split_dataset/dense_classes.py data/train.rec

Writes data/dense/train.rec and its .idx: the same images in the same order, with the keys 1, 2, ...; record 0 is a
header with label = (images + 1, classes).
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

import numpy as np
from tqdm import tqdm

from core.config import expand
from core.errors import report_errors
from dataset import RecordDataset
from recordio import IRHeader, RecordWriter, pack


class _WithGaps(RecordDataset):
    def _refuse_sparse(self, used):
        pass


def write_dense(rec):
    """Write the set; returns `(its path, images, classes)`. Raises as `RecordDataset`, except for sparse labels."""
    source = _WithGaps(rec)
    found, labels = np.unique(source.labels(), return_inverse=True)
    path = source.path.parent / "dense" / source.path.name
    path.parent.mkdir(exist_ok=True)
    with RecordWriter(path) as writer:
        writer.write(0, pack(IRHeader(0, [len(labels) + 1, len(found)], 0, 0), b""))
        for row, label in enumerate(tqdm(labels.tolist(), desc=path.name, unit="rec", disable=None)):
            header, image = source.reader.read_record(int(source.keys[row]))
            label = label if header.flag == 0 else [label, *header.label[1:]]
            writer.write(row + 1, pack(header._replace(label=label), image))
    return path, len(labels), len(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rec", type=expand, help="the .rec file, or a directory with train.rec")
    with report_errors():
        print("{}: {} images, {} classes".format(*write_dense(parser.parse_args().rec)))


if __name__ == "__main__":
    main()
