"""Split `train.rec` into the parts for the old and the new model, by classes and by images.

    python tools/split_dataset/split_dataset_ms1mv3.py --root dataset/ms1m-retinaface-t1 [--ratio 0.3]

Writes beside it, each with its `.idx` (30 and 70 stand for 100 * ratio and the rest):
- train_part_30_class: all images of the first round(ratio * classes) classes, labels unchanged;
- train_part_70_class: all images of the other classes, labels shifted to start at 0;
- train_part_30_data: the first max(1, round(ratio * n)) of each class's n images, in record order;
- train_part_70_data: the other images; a class's only image is in both parts.

`round` is Python's (half to even). Records are copied unchanged except for shifted labels; images keep their order and
get the keys 1, 2, ...; record 0 is a header with label = (images + 1, classes).
"""

import argparse
import contextlib
import os
import pathlib
import shlex
import struct
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

import numpy as np
from tqdm import tqdm

from core.config import expand
from core.errors import UserError, report_errors
from dataset import RecordDataset
from recordio import IRHeader, RecordWriter, pack

_WORD = struct.Struct("<I")
_LABEL = struct.Struct("<f")
_CHUNK = 1 << 14  # records per update of the progress bar


class SplitError(UserError):
    """A wrong option, or a set that cannot be split; the message says what to do."""


def first_classes(num_classes, ratio):
    """Number of classes in the first part of the class split."""
    count = round(ratio * num_classes)
    if not 0 < count < num_classes:
        raise SplitError(f"--ratio {ratio} of {num_classes} classes leaves one part empty; choose another")
    return count


def data_split(labels, ratio):
    """Masks bool [N] of the images of the first and of the second part; `labels` int64 [N] in any order."""
    size = np.bincount(labels)
    order = np.argsort(labels, kind="stable")  # by class, then in record order
    begin = np.cumsum(size) - size
    rank = np.empty_like(order)
    rank[order] = np.arange(len(labels)) - begin[labels[order]]
    first = rank < np.maximum(1, np.rint(ratio * size))[labels]  # rint rounds as Python's round does
    return first, ~first | (size == 1)[labels]


def relabelled(record, label):
    """A raw record (`RecordReader.read_raw`) with another label; None if its header is split over several parts."""
    (flag,) = _WORD.unpack_from(record, 8)
    place = 12 if flag == 0 else 32  # the header's own label, or the first of the label vector after it
    if (_WORD.unpack_from(record, 4)[0] & (1 << 29) - 1) + 8 < place + 4:
        return None
    record = bytearray(record)
    _LABEL.pack_into(record, place, label)
    return record


class Part:
    """One of the output files."""

    def __init__(self, path, num_image, num_classes):
        self.writer = RecordWriter(path)
        self.key = 0
        self._append(pack(IRHeader(0, [num_image + 1, num_classes], 0, 0), b""))

    def _append(self, payload):
        self.writer.write(self.key, payload)
        self.key += 1

    def copy(self, reader, key, record, label=None):
        """Append record `key` of `reader`, read as `record`; with another label where one is given."""
        if label is not None:
            record = relabelled(record, label)
            if record is None:
                header, image = reader.read_record(key)
                labels = label if header.flag == 0 else [label, *header.label[1:]]
                self._append(pack(header._replace(label=labels), image))
                return
        self.writer.write_raw(self.key, record)
        self.key += 1


def part_paths(root, ratio):
    """The `.rec` files of the class split and of the data split, two each."""
    percent = round(100 * ratio) if 0 < ratio < 1 else 0
    if percent in (0, 50, 100):
        raise SplitError(f"--ratio {ratio} must be between 0 and 1 and not 0.5, where both parts would have one name")
    return [root / f"train_part_{share}_{kind}.rec" for kind in ("class", "data") for share in (percent, 100 - percent)]


def split(root, ratio=0.3):
    """Split `root`/train.rec; returns `(path, images, classes)` of each file written.

    Raises `FileNotFoundError` or `RecordError` for a missing or broken set and `SplitError` for a root that is no
    directory, a ratio that does not split the set or a part most of whose classes would have no image; no output file
    is changed then.
    """
    paths = part_paths(root, ratio)
    if not os.path.isdir(root):
        raise SplitError(f"--root {root}: not a directory; name the one of train.rec and train.idx")
    source = RecordDataset(root / "train.rec")
    labels = source.labels()
    cut = first_classes(source.num_classes, ratio)
    in_class = [labels < cut, labels >= cut]
    in_data = data_split(labels, ratio)
    images = [int(member.sum()) for member in (*in_class, *in_data)]
    classes = [cut, source.num_classes - cut, source.num_classes, source.num_classes]
    for path, member, count in zip(paths, (*in_class, *in_data), classes):
        found = np.count_nonzero(np.bincount(labels[member]))
        if 2 * found < count:
            raise SplitError(
                f"{path}: would have images of {found} of its {count} classes; choose another --ratio, or split what "
                f"this writes: python tools/split_dataset/dense_classes.py {shlex.quote(str(source.path))}"
            )
    with contextlib.ExitStack() as stack:
        parts = []
        for path, *counts in zip(paths, images, classes):
            parts.append(Part(path, *counts))
            stack.enter_context(parts[-1].writer)
        _copy(source.reader, source.keys, parts, labels, cut, in_data)
    return list(zip(paths, images, classes))


def _copy(reader, keys, parts, labels, cut, in_data):
    low_class, high_class, first_data, second_data = parts
    with tqdm(total=len(keys), desc="split", unit="rec", disable=None) as bar:
        for start in range(0, len(keys), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            columns = (column[chunk].tolist() for column in (labels, *in_data))
            for key, label, first, second in zip(keys[chunk], *columns):
                record = reader.read_raw(key)
                if label < cut:
                    low_class.copy(reader, key, record)
                else:
                    high_class.copy(reader, key, record, label - cut)
                if first:
                    first_data.copy(reader, key, record)
                if second:
                    second_data.copy(reader, key, record)
            bar.update(len(keys[chunk]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=expand, required=True, help="directory of train.rec and train.idx")
    parser.add_argument("--ratio", type=float, default=0.3, help="the old model's share (default: 0.3)")
    with report_errors():
        args = parser.parse_args()
        for path, images, classes in split(args.root, args.ratio):
            print(f"{path}: {images} images, {classes} classes")


if __name__ == "__main__":
    main()
