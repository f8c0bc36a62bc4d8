"""tools/split_dataset against a plain restatement of both splits."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dataset import RecordDataset
from recordio import MAGIC, IRHeader, RecordError, RecordReader, RecordWriter, pack, unpack

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "tools" / "split_dataset" / "split_dataset_ms1mv3.py"
spec = importlib.util.spec_from_file_location("split_dataset_ms1mv3", SCRIPT)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def records(path):
    """`[(label, id, image bytes)]` of the images of a written part, in order, and its header's label."""
    with RecordReader(path) as reader:
        assert reader.keys.tolist() == list(range(len(reader)))
        header = reader.read_header(0)
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
    with pytest.raises(ValueError, match="ratio"):
        tool.split(tmp_path, ratio)
    assert sorted(os.listdir(tmp_path)) == ["train.idx", "train.rec"]


def test_a_ratio_that_leaves_a_part_without_classes_is_refused(tmp_path, make_record_set):
    make_record_set(tmp_path, [0, 1])
    with pytest.raises(ValueError, match="--ratio 0.1 of 2 classes"):
        tool.split(tmp_path, 0.1)


def run(*arguments, cwd):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_the_command_works_from_any_directory(tmp_path, make_record_set):
    make_record_set(tmp_path, LABELS["sorted"])
    done = run("--root", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train_part_30_class.rec: 6 images, 2 classes" in done.stdout and len(done.stdout.splitlines()) == 4
    failed = run("--root", "absent", cwd=tmp_path)
    assert failed.returncode == 1 and failed.stderr.startswith("error: absent") and "Traceback" not in failed.stderr
