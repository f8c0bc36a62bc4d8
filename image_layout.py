"""Which records of a training set are images, and how many classes it has: what its header record says."""

from collections import namedtuple

import numpy as np

from recordio import IRHeader, RecordError

_EXACT_FLOAT32 = 1 << 24  # float32 holds every integer up to here

ImageLayout = namedtuple("ImageLayout", ["keys", "num_classes"])


def is_image(payload):
    """Whether the bytes begin as a JPEG or a PNG does."""
    return payload[:3] == b"\xff\xd8\xff" or payload[:4] == b"\x89PNG"


def image_layout(reader):
    """Which records of a training set are images, and how many classes it states.

    Returns `ImageLayout(keys, num_classes)`: keys in record order, a range or an int64 array; None for classes that
    are not stated. Raises `RecordError` where header record and index disagree.

    Record 0 is a header where its flag is > 0 and it holds no image; without one every key is an image, in the order
    of the index. Its label[0] is the key after the last image; the images have the keys 1 ... label[0] - 1. In
    insightface's own sets (MS1M-V3: label = 5179511, 5272942) identity records follow, with the keys label[0] ...
    label[1] - 1, one a class. In sets that `tools/split_dataset` writes none follow, and label[1] counts the classes.
    float32 is exact only up to 2**24, so the counts are taken from the index, and the labels must round to them.
    """
    header, payload = reader.read_record(0) if 0 in reader else (IRHeader(0, 0.0, 0, 0), b"")
    if header.flag == 0 or is_image(payload):
        return ImageLayout(reader.keys, None)
    counts = [float(value) for value in header.label[:2]]
    says = f"{reader.path}: key 0 at offset {reader.offset(0)}: the header record says label = {counts}"
    if any(not (value >= 1 and value.is_integer()) for value in counts):
        raise RecordError(f"{says}, which are no counts; write the set anew")
    gap = reader.first_missing_key()
    if gap is not None:
        raise RecordError(f"{says}, but key {gap} is not in {reader.idx_path.name}; copy or write the index anew")
    end = len(reader)  # the keys are 0 ... end - 1
    first_identity = _first_identity(reader, counts, end)
    if first_identity is not None:
        return ImageLayout(range(1, first_identity), end - first_identity)
    if np.float32(end) != counts[0]:
        raise RecordError(f"{says}, but {reader.idx_path.name} has the keys 0 to {end - 1}: one of them is not its own")
    if len(counts) == 2 and counts[1] > _EXACT_FLOAT32:
        raise RecordError(f"{says}; so many classes cannot be told apart by float32 labels")
    return ImageLayout(range(1, end), int(counts[1]) if len(counts) == 2 else None)


def _first_identity(reader, counts, end):
    """The key of the first identity record where a set of keys 0 ... end - 1 is of insightface's form, else None."""
    if len(counts) < 2 or np.float32(end) != counts[1] or counts[0] > counts[1]:
        return None
    if counts[0] < _EXACT_FLOAT32:  # 2**24 itself may stand for 2**24 + 1
        return int(counts[0]) if counts[0] < end else None
    # Inexact: the identity records, which hold no image, begin at a key that rounds to label[0].
    reach = int(np.spacing(np.float32(counts[0])))
    for key in range(int(counts[0]) - reach, min(int(counts[0]) + reach + 1, end)):
        if np.float32(key) == counts[0] and not reader.read_record(key)[1]:
            return key if reader.read_record(key - 1)[1] else None
    return None
