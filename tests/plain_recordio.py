"""A plain reader of the record format, for comparison with recordio.py and image_layout.

`hold_against_plain` is the whole of it: two files of any bytes, and whatever a RecordReader can be asked about them.
"""

import pickle
import re
import struct

import numpy as np

from dataset import image_layout
from recordio import MAGIC, RecordError, RecordReader, class_label

_WORD = struct.pack("<I", MAGIC)


class Wrong(Exception):
    """Not allowed by the format."""


def plain_index(text):
    """`{key: offset}` in the order of the lines."""
    lines = text.replace(b"\r\n", b"\n").split(b"\n")
    offsets = {}
    for line in lines[:-1] if lines[-1] == b"" else lines:
        match = re.fullmatch(rb"([0-9]{1,18})\t([0-9]{1,18})", line)
        if not match or int(match[1]) in offsets:
            raise Wrong
        offsets[int(match[1])] = int(match[2])
    return offsets


def plain_record(rec, offset):
    """`(payload, where the record ends in the file)` of the record at `offset`."""
    parts, flag = [], None
    while flag not in (0, 3):
        if offset % 4 or offset + 8 > len(rec):
            raise Wrong
        magic, word = struct.unpack_from("<II", rec, offset)
        flag, length = word >> 29, word % 2**29
        if magic != MAGIC or flag not in ((2, 3) if parts else (0, 1)):
            raise Wrong
        stop = offset + 8 + length
        parts.append(rec[offset + 8 : stop])
        offset = stop + -stop % 4
        if offset > len(rec):
            raise Wrong
    payload = _WORD.join(parts)
    if len(payload) >= 2**29:
        raise Wrong
    return payload, offset


def plain_image(payload):
    """`(flag, labels, id, id2, image bytes)`; labels are the one of the header or those that follow it."""
    if len(payload) < 24:
        raise Wrong
    flag, label, *ids = struct.unpack_from("<IfQQ", payload)
    if len(payload) < 24 + 4 * flag:
        raise Wrong
    labels = struct.unpack_from(f"<{flag}f", payload, 24) if flag else (label,)
    return flag, labels, *ids, payload[24 + 4 * flag :]


def plain_layout(offsets, image):
    """`(keys of the images, classes or None)` of a set of fewer than 2**24 records; `image(key)` as `plain_image`."""
    if 0 not in offsets:
        return list(offsets), None
    flag, counts, _, _, rest = image(0)
    if flag == 0 or rest.startswith((b"\xff\xd8\xff", b"\x89PNG", b"BM", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")):
        return list(offsets), None
    counts, end = counts[:2], len(offsets)
    if sorted(offsets) != list(range(end)) or not all(count >= 1 and count % 1 == 0 for count in counts):
        raise Wrong
    if len(counts) == 2 and counts[1] == end and counts[0] < end:
        return list(range(1, int(counts[0]))), end - int(counts[0])
    if counts[0] != end or len(counts) == 2 and counts[1] > 2**24:
        raise Wrong
    return list(range(1, end)), int(counts[1]) if len(counts) == 2 else None


def _same(a, b):
    """Equal, where NaN equals NaN, as float32 where they are floats."""
    return np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32), equal_nan=True)


def _holds(reader, plain, ask, same=lambda a, b: a == b):
    """Assert that `ask()` equals `plain()`, or raises a RecordError naming the file where that raises Wrong."""
    try:
        expected = plain()
    except Wrong:
        try:
            answer = ask()
        except RecordError as error:
            message = str(error)
            assert message.startswith((f"{reader.path}: ", f"{reader.idx_path}: ")), message
            assert len(message) < 2 * len(str(reader.path)) + 300, message
            return
        raise AssertionError(f"no RecordError, but {answer!r}") from None
    assert same(ask(), expected)


def hold_against_plain(folder, rec, idx, most_keys=50):
    """Write the bytes as `fuzz.rec` and `fuzz.idx` and ask a RecordReader all that it can be asked.

    Asserts that each answer is the plain one, or a RecordError where there is none. Any other exception goes through.
    """
    path = folder / "fuzz.rec"
    path.write_bytes(rec)
    path.with_suffix(".idx").write_bytes(idx)
    try:
        offsets = plain_index(idx)
    except Wrong:
        try:
            RecordReader(path)
        except RecordError as error:
            assert str(error).startswith(f"{path.with_suffix('.idx')}: ") and len(str(error)) < len(str(path)) + 400
            return
        raise AssertionError("no RecordError for a wrong index") from None
    with RecordReader(path) as reader:
        assert reader.keys.tolist() == list(offsets) and reader.keys.dtype == np.int64 and len(reader) == len(offsets)
        _ask_of_keys(reader, rec, offsets, most_keys)
        _ask_of_all(reader, rec, offsets)


def _ask_of_keys(reader, rec, offsets, most_keys):
    keys = list(offsets)[:most_keys]
    near = [key + step for key in keys[:1] for step in (-1, 1)]
    for key in {*keys, *near, -1, 0, 2**62, 2**70}:

        def offset():
            if key not in offsets:
                raise Wrong
            return offsets[key]

        def payload():
            return plain_record(rec, offset())[0]

        assert (key in reader) == (key in offsets)
        _holds(reader, offset, lambda: reader.offset(key))
        _holds(reader, payload, lambda: reader.read(key))
        _holds(reader, lambda: rec[offset() : plain_record(rec, offset())[1]], lambda: reader.read_raw(key))
        _holds(reader, lambda: plain_image(payload()), lambda: reader.read_record(key), _same_record)
        _holds(reader, lambda: plain_image(payload()), lambda: reader.read_image(key), _same_image)
        if key < 2**63:
            _holds(reader, lambda: plain_image(payload())[1][0], lambda: reader.read_labels([key])[0], _same)


def _same_record(answer, expected):
    (flag, label, *ids), image = answer
    return (
        (flag, *ids) == (expected[0], *expected[2:4])
        and image == expected[4]
        and _same(np.ravel(label), expected[1])
        and _same(class_label(answer[0]), expected[1][0])
    )


def _same_image(answer, expected):
    label, image = answer
    return _same(label, expected[1][0]) and image.dtype == np.uint8 and image.tobytes() == expected[4]


def _ask_of_all(reader, rec, offsets):
    def image(key):
        return plain_image(plain_record(rec, offsets[key])[0])

    def labels(keys):
        return [image(key)[1][0] for key in keys]

    def last():
        return offsets and plain_record(rec, max(offsets.values())) and None

    sound = [key for key in offsets if is_right(lambda: image(key))]
    _holds(reader, lambda: labels(offsets), lambda: reader.read_labels(reader.keys), _same)
    _holds(reader, lambda: labels(sound * 2), lambda: reader.read_labels(sound * 2), _same)
    _holds(reader, lambda: last() or None, reader.check)
    assert reader.first_missing_key() == next((i for i, key in enumerate(sorted(offsets)) if key != i), None)
    _holds(
        reader,
        lambda: plain_layout(offsets, image),
        lambda: image_layout(reader),
        lambda answer, expected: (list(answer.keys), answer.num_classes) == expected,
    )
    with pickle.loads(pickle.dumps(reader)) as copy:
        assert copy.keys.tolist() == list(offsets)


def is_right(function):
    try:
        function()
        return True
    except Wrong:
        return False
