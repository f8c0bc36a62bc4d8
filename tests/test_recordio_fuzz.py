"""Whatever the bytes of a .rec and its .idx: a RecordError or the plain reader's answer, in bounded memory.

tests/fuzz/fuzz_recordio.py searches for longer.
"""

import math
import struct
import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies

from dataset import RecordDataset, decode_bgr, image_layout
from recordio import MAGIC, RecordError, RecordReader, RecordWriter, pack
from tests.plain_recordio import (
    Wrong,
    hold_against_plain,
    is_right,
    plain_image,
    plain_index,
    plain_layout,
    plain_record,
)

WORD = struct.pack("<I", MAGIC)
QUICK = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def frame(payload, flag=0, length=None, magic=MAGIC, padding=True):
    length = len(payload) if length is None else length
    return struct.pack("<II", magic, flag << 29 | length) + payload + bytes(-len(payload) % 4 * padding)


# --- strategies: files that are nearly right -------------------------------------------------------------------------

NUMBER = strategies.integers(0, 40) | strategies.sampled_from(
    [2**16, 2**24, 2**29 - 1, 2**29, 2**31, 2**32 - 4, 2**32, 2**63 - 1, 2**63, 2**64, 10**18 - 1, 10**18, 10**30]
)
ODD_LABELS = [1.5, math.nan, math.inf, -math.inf, 2.0**25, 1e30]
LABEL = strategies.integers(-1, 9).map(float) | strategies.sampled_from(ODD_LABELS)
FLAG = strategies.integers(0, 3) | strategies.sampled_from([7, 2**29, 2**30 - 6, 2**31, 2**32 - 1])
TAIL = strategies.sampled_from([b"", WORD, b"\xff\xd8\xff", b"\x89PNG", b"abc" + WORD, b"abcd" + WORD + WORD])
IMAGE = strategies.builds(
    lambda flag, label, labels, image: struct.pack("<IfQQ", flag, label, MAGIC << 32, 2) + labels + image,
    FLAG,
    LABEL,
    strategies.lists(LABEL, max_size=4).map(lambda labels: struct.pack(f"<{len(labels)}f", *labels)),
    TAIL,
)
CUT_IMAGE = strategies.builds(lambda payload, end: payload[:end], IMAGE, strategies.integers(0, 40))
PAYLOAD = IMAGE | CUT_IMAGE | strategies.binary(max_size=30) | TAIL


def in_parts(payload):
    """As a writer lays it out."""
    parts = [payload]
    for at in range(len(payload) // 4 * 4 - 4, -1, -4):
        if payload[at : at + 4] == WORD:
            parts[:1] = [parts[0][:at], parts[0][at + 4 :]]
    flags = [0] if len(parts) == 1 else [1] + [2] * (len(parts) - 2) + [3]
    return b"".join(map(frame, parts, flags))


PIECE = strategies.one_of(
    PAYLOAD.map(in_parts),
    PAYLOAD.map(in_parts),
    strategies.builds(frame, PAYLOAD, strategies.integers(0, 7), strategies.none() | strategies.integers(0, 2**29 - 1)),
    strategies.builds(frame, PAYLOAD, magic=strategies.sampled_from([MAGIC, MAGIC ^ 1, 0])),
    strategies.builds(frame, PAYLOAD, padding=strategies.just(False)),
    strategies.lists(strategies.builds(frame, CUT_IMAGE, strategies.integers(0, 3)), max_size=4).map(b"".join),
    strategies.binary(max_size=12),
)
INDEX_LIKE = strategies.text("0129\t\n\r \0", max_size=40).map(str.encode)
EDIT = strategies.tuples(strategies.integers(0, 400), strategies.integers(0, 5), strategies.binary(max_size=5))


def edited(data, edits):
    data = bytearray(data)
    for place, count, new in edits:
        at = place % (len(data) + 1)
        data[at : at + count] = new
    return bytes(data)


@strategies.composite
def record_sets(draw, piece=PIECE):
    """`(rec, idx)`: records in a row, an index that mostly points at them, and some damage to both."""
    pieces = draw(strategies.lists(piece, min_size=1, max_size=7))
    if draw(strategies.booleans()):  # a header record with counts near those of the index
        near = strategies.integers(-1, 2).map(lambda step: float(max(len(pieces) + 1 + step, 0)))
        counts = draw(strategies.lists(near | LABEL, min_size=1, max_size=3))
        pieces.insert(0, frame(struct.pack(f"<IfQQ{len(counts)}f", len(counts), 0, 0, 0, *counts)))
    starts = np.cumsum([0] + [len(piece) for piece in pieces]).tolist()
    keys = list(range(len(pieces)))
    if draw(strategies.booleans()):
        keys = draw(strategies.permutations(keys) | strategies.lists(NUMBER, max_size=8))
    offsets = dict(enumerate(starts))
    if draw(strategies.booleans()):
        anywhere = strategies.sampled_from(starts) | NUMBER
        offsets = draw(strategies.dictionaries(strategies.sampled_from(keys or [0]), anywhere))
    end = draw(strategies.sampled_from(["\n", "\n", "\r\n"]))
    idx = "".join(f"{key}\t{offsets.get(key, starts[key % len(starts)])}{end}" for key in keys).encode()
    rec = edited(b"".join(pieces), draw(strategies.lists(EDIT, max_size=2)))
    rec = rec[: draw(strategies.sampled_from([None, None, -1, -4, -9]))]
    return rec, edited(idx, draw(strategies.just([]) | strategies.lists(EDIT, max_size=1)))


# --- every answer is the plain one -----------------------------------------------------------------------------------


@QUICK
@given(record_sets())
@example((b"", b""))
@example((b"", b"0\t0\n"))
@example((b"ab", b"0\t0"))
@example((b"", b"\n"))
@example((2 * frame(struct.pack("<IfQQ", 0, 3, 1, 2)), b"0\t0\n1\t999999999999999999\n2\t2\n"))
@example((in_parts(struct.pack("<IfQQ", 2, 3, MAGIC << 32, 2) + WORD + b"abcd" + WORD), b"5\t0\n4\t0\n"))
@example((frame(b"", 2) + frame(b"", 3), b"0\t0\n"))
@example((frame(b"") * 3 + frame(b"", 1) + frame(b"", 2) + frame(b"", 0), b"0\t0\n1\t8\n2\t24\n"))
@example((frame(struct.pack("<IfQQ", 0, 3, 1, 2) + b"abc")[:-1], b"0\t0\n"))  # the padding is cut, not the image
def test_random_files_equal_the_plain_reader(tmp_path_factory, files):
    hold_against_plain(tmp_path_factory.getbasetemp(), *files)


@QUICK
@given(strategies.binary(max_size=60), strategies.binary(max_size=40) | INDEX_LIKE)
def test_any_bytes_at_all(tmp_path_factory, rec, idx):
    hold_against_plain(tmp_path_factory.getbasetemp(), rec, idx)


def test_a_record_inside_another_is_read(tmp_path):
    inner = frame(struct.pack("<IfQQ", 0, 7, 0, 0) + b"inner")
    outer = frame(struct.pack("<IfQQ", 0, 5, 0, 0) + inner)
    hold_against_plain(tmp_path, outer, b"0\t0\n1\t32\n2\t0\n")
    with RecordReader(tmp_path / "fuzz.rec") as reader:
        assert reader.read_labels([0, 1, 2]).tolist() == [5, 7, 5]


# --- the training set on top -----------------------------------------------------------------------------------------


def jpeg(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return cv2.imencode(".jpg", cv2.resize(coarse, (112, 112)), [cv2.IMWRITE_JPEG_QUALITY, 30])[1].tobytes()


WHOLE = [jpeg(0), jpeg(1)]
NOT_WHOLE = [WHOLE[0][:-9], cv2.imencode(".png", np.zeros((9, 9)))[1].tobytes(), b""]
FACE = strategies.sampled_from(3 * WHOLE + NOT_WHOLE)
CLASS = strategies.sampled_from([0.0, 1.0, 2.0, 0.0, 1.0, 2.0, -1.0, 4.0, 1.5, math.nan])
FACE_RECORD = strategies.builds(
    lambda label, face: in_parts(pack((0, label, 1, 0), face)),
    CLASS | strategies.lists(CLASS, min_size=1, max_size=2),
    FACE,
)


def plain_items(rec, idx):
    """`(classes, [(label, BGR image) or None for each row])`, or Wrong where the set cannot be opened."""
    offsets = plain_index(idx)

    def image(key):
        return plain_image(plain_record(rec, offsets[key])[0])

    if offsets:
        plain_record(rec, max(offsets.values()))
    keys, classes = plain_layout(offsets, image)
    vectors = [image(key)[1] for key in keys if is_right(lambda key=key: image(key))]
    if vectors and all(len(vector) > 1 and sorted(vector) == [0] * (len(vector) - 1) + [1] for vector in vectors):
        raise Wrong
    if classes is None or classes > 2 * len(keys):
        labels = [image(key)[1][0] for key in keys]
        if not all(0 <= label < (classes or 2**24) and label % 1 == 0 for label in labels):
            raise Wrong
        classes = classes or int(max(labels, default=-1)) + 1
        if 2 * len(set(labels)) < classes:
            raise Wrong

    def item(key):
        try:
            _, labels, _, _, data = image(key)
            bgr = decode_bgr(np.frombuffer(data, np.uint8))  # test_dataset_image.py holds this against OpenCV
        except (Wrong, ValueError):
            return None
        return (int(labels[0]), bgr) if 0 <= labels[0] < classes and labels[0] % 1 == 0 else None

    return classes, [item(key) for key in keys]


@settings(QUICK, max_examples=100)
@given(record_sets(FACE_RECORD))
def test_a_training_set_is_refused_or_right(tmp_path_factory, files):
    path = tmp_path_factory.getbasetemp() / "set.rec"
    path.write_bytes(files[0])
    path.with_suffix(".idx").write_bytes(files[1])
    try:
        classes, items = plain_items(*files)
    except Wrong:
        with pytest.raises(RecordError, match="set.(rec|idx): "):
            RecordDataset(path)
        return
    dataset = RecordDataset(path)
    assert (dataset.num_classes, len(dataset)) == (classes, len(items))
    for row, item in enumerate(items):
        if item is None:
            with pytest.raises(RecordError, match="set.rec: key "):
                dataset[row]
        else:
            image, label, index = dataset[row]
            assert (label, index) == (item[0], row) and np.array_equal(image.numpy()[..., ::-1], item[1])


# --- nothing is reserved that is not there ---------------------------------------------------------------------------


def within_bounds(tmp_path, rec, idx, factor=20):
    """Memory is bounded by the index's block or size, and by the records' size in the file."""
    path = tmp_path / "big.rec"
    path.write_bytes(rec)
    path.with_suffix(".idx").write_bytes(idx)
    tracemalloc.start()
    try:
        with RecordReader(path) as reader:
            assert tracemalloc.get_traced_memory()[1] < 2**24 + 60 * len(idx)
            keys = {*reader.keys[:3].tolist(), *reader.keys[-3:].tolist()}
            for ask in (reader.read, reader.read_raw, reader.read_record, reader.read_image):
                for key in keys:
                    costs(lambda: ask(key), factor * len(rec))
            costs(lambda: reader.read_labels(reader.keys), 20 * (len(rec) + len(idx)))
            costs(lambda: image_layout(reader), 20 * (len(rec) + len(idx)))
            costs(reader.check, factor * len(rec))
    except RecordError as error:
        assert len(str(error)) < 400 and tracemalloc.get_traced_memory()[1] < 2**24 + 60 * len(idx)
    finally:
        tracemalloc.stop()


def costs(ask, most):
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        ask()
    except RecordError as error:
        assert len(str(error)) < 400
    assert tracemalloc.get_traced_memory()[1] - before < 20_000 + most


@pytest.mark.parametrize("flag", [1, 5, 2**29, 2**30 - 6, 2**30, 2**31, 2**32 - 1])
def test_declared_labels_allocate_nothing(tmp_path, flag):
    for payload in (struct.pack("<IfQQ", flag, 0, 0, 0), struct.pack("<IfQQ", flag, 0, MAGIC << 32, 0) + bytes(3)):
        within_bounds(tmp_path, in_parts(payload) * 2, b"0\t0\n1\t0\n")


@pytest.mark.parametrize("length", [2**28, 2**29 - 1])
@pytest.mark.parametrize("flag", [0, 1])
def test_declared_lengths_allocate_nothing(tmp_path, flag, length):
    within_bounds(tmp_path, frame(bytes(40), flag, length) * 2, b"0\t0\n1\t48\n")


def test_keys_and_offsets_allocate_nothing(tmp_path):
    for key in (2**31, 2**53 + 1, 10**18 - 1):
        within_bounds(tmp_path, frame(bytes(40)), f"0\t0\n{key}\t{key}\n".encode())


def test_the_maximum_number_of_parts(tmp_path):
    for part in (b"", b"abc"):
        middle = frame(part, 2) * 1000
        within_bounds(tmp_path, frame(b"", 1) + middle + frame(b"", 3), b"0\t0\n", factor=8)
        within_bounds(tmp_path, frame(b"", 1) + middle, b"0\t0\n", factor=8)


@pytest.mark.parametrize("idx", [b"1" * 2**20, b"1\t" * 2**19, b"\n" * 2**20, bytes(2**20), b"0\t0\n" + b"7" * 2**20])
def test_an_index_without_newlines_or_with_nothing_else(tmp_path, idx):
    within_bounds(tmp_path, frame(bytes(40)), idx)


def test_an_endless_index_line_is_not_read_to_its_end(tmp_path):
    """It is refused early, however long it is."""
    path = tmp_path / "a.rec"
    RecordWriter(path).close()
    with open(path.with_suffix(".idx"), "wb") as file:
        file.truncate(1 << 31)  # of zeros, which take no room on the disk
    tracemalloc.start()
    with pytest.raises(RecordError, match=r"a\.idx: line 1 is b'\\x00"):
        RecordReader(path)
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()
