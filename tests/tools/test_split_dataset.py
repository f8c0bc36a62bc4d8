"""tools/split_dataset against a plain restatement of both splits."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from dataset import RecordDataset
from recordio import MAGIC, IRHeader, RecordError, RecordReader, RecordWriter, pack, unpack

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "tools" / "split_dataset"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool, dense_classes = load("split_dataset_ms1mv3"), load("dense_classes")


def records(path):
    """`[(label, id, image bytes)]` of the images of a written part, in order, and its header's label."""
    with RecordReader(path) as reader:
        assert reader.keys.tolist() == list(range(len(reader)))
        header, _ = reader.read_record(0)
        images = [unpack(reader.read(key)) for key in range(1, len(reader))]
    return [(float(np.ravel(its.label)[0]), its.id, image) for its, image in images], header.label.tolist()


def plain_split(images, num_classes, ratio):
    """The four parts of `images`, image by image."""
    cut = round(ratio * num_classes)
    low = [image for image in images if image[0] < cut]
    high = [(label - cut, *rest) for label, *rest in images if label >= cut]
    first, second = [], []
    for position, image in enumerate(images):
        before = sum(other[0] == image[0] for other in images[:position])
        count = sum(other[0] == image[0] for other in images)
        if before < max(1, round(ratio * count)):
            first.append(image)
        if before >= max(1, round(ratio * count)) or count == 1:
            second.append(image)
    return [(low, cut), (high, num_classes - cut), (first, num_classes), (second, num_classes)]


LABELS = {
    "sorted": [0] * 5 + [1] + [2] * 15 + [3] * 2 + [4] * 25 + [5] * 4 + [6] * 3,
    "mixed": np.random.default_rng(0).integers(0, 9, 60).tolist() + [9, 10],
    "one image a class": [3, 1, 0, 2, 4],
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize("header", [True, "insightface", False])
@pytest.mark.parametrize("ratio", [0.3, 0.45])
def test_the_parts_are_those_of_the_plain_rule(tmp_path, make_record_set, labels, header, ratio):
    path = make_record_set(tmp_path, labels, header=header)
    with RecordReader(path) as reader:
        keys = range(1 if header else 0, len(labels) + bool(header))
        images = [(float(its.label), its.id, image) for its, image in (unpack(reader.read(key)) for key in keys)]
    written = tool.split(tmp_path, ratio)
    percent = round(100 * ratio)
    names = [f"train_part_{share}_{kind}" for kind in ("class", "data") for share in (percent, 100 - percent)]
    assert [str(its[0]) for its in written] == [str(tmp_path / f"{name}.rec") for name in names]
    for (part, counted, classes), (expected, its_classes) in zip(written, plain_split(images, max(labels) + 1, ratio)):
        found, counts = records(part)
        assert found == expected and counts == [len(expected) + 1, its_classes]
        assert (counted, classes) == (len(expected), its_classes)
        dataset = RecordDataset(part)
        assert (dataset.num_image, dataset.num_classes) == (len(expected), its_classes)
        assert dataset.labels().tolist() == [image[0] for image in expected]
    files = [f"{name}.{end}" for name in [*names, "train"] for end in ("rec", "idx")]
    assert sorted(os.listdir(tmp_path)) == sorted(files)


def test_halves_round_to_the_even_neighbour():
    assert tool.first_classes(5, 0.5) == 2 and tool.first_classes(7, 0.5) == 4
    labels = np.repeat(np.arange(8), np.arange(1, 9))
    first, second = tool.data_split(labels, 0.5)
    assert np.bincount(labels[first]).tolist() == [1, 1, 2, 2, 2, 3, 4, 4]
    assert np.bincount(labels[second]).tolist() == [1, 1, 1, 2, 3, 3, 3, 4]


def test_vector_labels_and_records_in_parts_are_relabelled(tmp_path):
    magic_id = MAGIC << 32 | MAGIC  # the header itself holds the magic word, and is cut there
    word = MAGIC.to_bytes(4, "little")
    sources = [
        IRHeader(0, 0.0, 1, 0),
        IRHeader(0, [1.0, 0.25], 2, 0),
        IRHeader(0, 2.0, magic_id, 0),
        IRHeader(0, [3.0, 0.25], magic_id, 9),
        IRHeader(0, 4.0, 5, 0),
    ]
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, pack(IRHeader(0, [6, 5], 0, 0), b""))
        for key, header in enumerate(sources, start=1):
            writer.write(key, pack(header, b"data" + word + bytes([key])))
    tool.split(tmp_path, 0.2)
    with RecordReader(tmp_path / "train_part_80_class.rec") as reader:
        for key, source in enumerate(sources[1:], start=1):
            header, image = reader.read_record(key)
            label = np.ravel(np.float32(source.label)) - np.eye(1, np.size(source.label), dtype=np.float32)[0]
            assert np.array_equal(np.ravel(header.label), label)
            assert header.flag == (np.size(label) if key in (1, 3) else 0)
            assert (header.id, header.id2, image) == (source.id, source.id2, b"data" + word + bytes([key + 1]))
    with RecordReader(tmp_path / "train_part_80_data.rec") as part, RecordReader(tmp_path / "train.rec") as source:
        assert all(part.read_raw(key) == source.read_raw(key) for key in range(1, 6))


def test_a_broken_set_leaves_nothing_behind(tmp_path, make_record_set):
    path = make_record_set(tmp_path, LABELS["mixed"])
    with RecordReader(path) as reader:
        offset = reader.offset(40)
    data = bytearray(path.read_bytes())
    data[offset + 7] |= 0x20  # claims to be the first of several parts
    path.write_bytes(data)
    with pytest.raises(RecordError, match="key 40 at offset"):
        tool.split(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["train.idx", "train.rec"]


def test_an_error_while_copying_leaves_the_old_parts(tmp_path, make_record_set, monkeypatch):
    make_record_set(tmp_path, LABELS["mixed"])
    tool.split(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(self, key):
        if key == 40:
            raise OSError("disk gone")
        return read_raw(self, key)

    read_raw = RecordReader.read_raw
    monkeypatch.setattr(RecordReader, "read_raw", fail)
    with pytest.raises(OSError, match="disk gone"):
        tool.split(tmp_path, 0.4)
    with pytest.raises(OSError, match="disk gone"):
        tool.split(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("ratio", [0, 1, -0.3, 1.3, 0.5, 0.001, 0.999, float("nan")])
def test_ratios_that_name_no_two_parts_are_refused(tmp_path, make_record_set, ratio):
    make_record_set(tmp_path, LABELS["mixed"])
    with pytest.raises(tool.SplitError, match="--ratio"):
        tool.split(tmp_path, ratio)
    assert sorted(os.listdir(tmp_path)) == ["train.idx", "train.rec"]


def test_a_ratio_that_leaves_a_part_without_classes_is_refused(tmp_path, make_record_set):
    make_record_set(tmp_path, [0, 1])
    with pytest.raises(tool.SplitError, match="--ratio 0.1 of 2 classes"):
        tool.split(tmp_path, 0.1)


def test_the_commands_work_from_any_directory(tmp_path, make_record_set):
    make_record_set(tmp_path, LABELS["sorted"])
    for script, *options in (("split_dataset_ms1mv3", "--root", "."), ("dense_classes", "train_part_30_class")):
        command = [sys.executable, str(FOLDER / f"{script}.py"), *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and "train_part_30_class.rec: 6 images, 2 classes\n" in done.stdout, done.stderr


@pytest.fixture
def failure(tmp_path, monkeypatch, capsys):
    """A function that runs `module.main()` with options in tmp_path and returns what it prints as it fails."""

    def failure(module, *options):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [module.__name__, *options])
        with pytest.raises(SystemExit, match="1"):
            module.main()
        return capsys.readouterr().err

    return failure


@pytest.mark.parametrize(
    "options, why",
    [
        (["--root", "absent"], "--root absent: not a directory; name the one of train.rec"),
        (["--root", "train.rec"], "--root train.rec: not a directory"),
        (["--root", "a" * 300], "--root a{300}: not a directory"),
        (["--root", "empty"], "empty/train.rec: neither a .rec file"),
        (["--root", ".", "--ratio", "2"], "--ratio 2.0 must be between 0 and 1"),
        (["--root", "$NOWHERE/x"], ".NOWHERE/x: .NOWHERE is not set in the environment"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, make_record_set, failure, options, why):
    make_record_set(tmp_path, LABELS["sorted"])
    (tmp_path / "empty").mkdir()
    assert re.fullmatch(rf"\w+Error: {why}.*\n", failure(tool, *options))


# --- labels with gaps ---------------------------------------------------------------------------------------------


def test_a_set_with_gaps_is_not_split(tmp_path, make_record_set):
    make_record_set(tmp_path, [0, 1, 2, 90, 91] * 100)
    with pytest.raises(RecordError, match="500 images of 5 classes, labels up to 91: .*/dense_classes.py .*train.rec$"):
        tool.split(tmp_path)
    make_record_set(tmp_path, [0, 1, 2, 3, 4, 9])
    with pytest.raises(tool.SplitError, match="70_class.rec: would have images of 3 of its 7 classes; .*dense_classes"):
        tool.split(tmp_path)
    make_record_set(tmp_path, [*range(10)] * 2)  # no gaps, but nine tenths of two images are both
    with pytest.raises(tool.SplitError, match="10_data.rec: would have images of 0 of its 10 classes; .* --ratio"):
        tool.split(tmp_path, 0.9)
    assert sorted(os.listdir(tmp_path)) == ["train.idx", "train.rec"]


def images_of(path):
    """`[(labels, id, image bytes)]` of all records that have an image."""
    with RecordReader(path) as reader:
        found = [reader.read_record(key) for key in reader.keys.tolist()]
    return [(np.ravel(header.label).tolist(), header.id, image) for header, image in found if image]


@pytest.mark.parametrize("header", [True, "insightface", False])
def test_classes_are_renumbered_without_gaps(tmp_path, make_record_set, header):
    path = make_record_set(tmp_path, [7, 900, 7, 90, 5, 900], header=header)
    assert dense_classes.write_dense(path) == (tmp_path / "dense" / "train.rec", 6, 4)
    found, counts = records(tmp_path / "dense" / "train.rec")
    assert counts == [7, 4] and [label for label, *_ in found] == [1, 3, 1, 2, 0, 3]
    assert [image[1:] for image in found] == [image[1:] for image in images_of(path)]
    assert RecordDataset(tmp_path / "dense").num_classes == 4
    tool.split(tmp_path / "dense")


def test_numbers_behind_the_class_are_kept(tmp_path):
    with RecordWriter(tmp_path / "faces.rec") as writer:
        for key, label in enumerate([8.0, 2.0, 8.0]):
            writer.write(key, pack(IRHeader(0, [label, 0.25, -1.0], key, 0), b"\xff\xd8\xff"))
    dense_classes.write_dense(tmp_path / "faces")
    assert [image[0] for image in images_of(tmp_path / "dense" / "faces.rec")] == [
        [1, 0.25, -1],
        [0, 0.25, -1],
        [1, 0.25, -1],
    ]


def test_labels_that_cannot_be_told_apart_are_not_renumbered(tmp_path, make_record_set, failure):
    make_record_set(tmp_path, [0, 2**24], header=False)
    assert re.fullmatch(r"RecordError: train\.rec: .*float32.*\n", failure(dense_classes, "train.rec"))
    assert sorted(os.listdir(tmp_path)) == ["train.idx", "train.rec"]
