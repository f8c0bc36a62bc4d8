"""The training set and its header record."""

import gc
import multiprocessing
import pickle
import types

import cv2
import numpy as np
import pytest
import torch

from dataset import RecordDataset, SyntheticDataset, decode_bgr, image_layout, open_train_set
from engine.loader import ExtractLoader, TrainLoader
from recordio import IRHeader, RecordError, RecordReader, RecordWriter, pack, unpack

LABELS = [3, 0, 1, 1, 2, 0, 3, 3, 1, 2, 0]


def rewrite(path, change):
    """Rewrite the set with `change(key, payload)` for each record; a payload of None drops the record."""
    with RecordReader(path) as reader:
        records = {key: reader.read(key) for key in reader.keys.tolist()}
    with RecordWriter(path) as writer:
        for key, payload in records.items():
            payload = change(key, payload)
            if payload is not None:
                writer.write(key, payload)


def relabel(path, labels):
    """Give the images, in record order, other labels."""
    labels = iter(labels)

    def change(key, payload):
        header, image = unpack(payload)
        return pack(header._replace(label=next(labels)), image) if image else payload

    rewrite(path, change)


def expected_image(path, key):
    """RGB uint8 [112, 112, 3], decoded here."""
    with RecordReader(path) as reader:
        return cv2.imdecode(np.frombuffer(unpack(reader.read(key))[1], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


@pytest.fixture
def path(tmp_path, make_record_set):
    return make_record_set(tmp_path, LABELS)


@pytest.mark.parametrize("header", [True, "insightface", False])
def test_items_are_the_images_in_record_order(tmp_path, make_record_set, header):
    path = make_record_set(tmp_path, LABELS, header=header)
    dataset = RecordDataset(path)
    assert (len(dataset), dataset.num_image, dataset.num_classes, dataset.path) == (11, 11, 4, path)
    for row, label in enumerate(LABELS):
        image, its_label, index = dataset[row]
        assert image.dtype == torch.uint8 and its_label == dataset.label(row) == label and index == row
        assert np.array_equal(image.numpy(), expected_image(path, row + bool(header)))
    assert dataset.labels().tolist() == LABELS and dataset.labels().dtype == np.int64
    assert [index for _, _, index in dataset] == list(range(11))  # IndexError ends the iteration


def test_every_form_of_a_path_opens_the_set(tmp_path, make_record_set):
    make_record_set(tmp_path / "set.v2.rec", LABELS)
    make_record_set(tmp_path, LABELS[:5])
    for name, images in (("set.v2.rec", 11), ("set.v2", 11), ("train", 5), ("", 5), (".", 5)):
        assert len(open_train_set(tmp_path / name)) == len(open_train_set(str(tmp_path / name))) == images
    for absent in ("absent", "absent/" * 9, "a" * 300):
        with pytest.raises(FileNotFoundError, match="neither a .rec file"):
            open_train_set(tmp_path / absent)
    with pytest.raises(RecordError, match="train.idx: is an index; give the .rec file beside it"):
        open_train_set(tmp_path / "train.idx")


@pytest.mark.parametrize(
    "name, ratio",
    [
        ("train_part_30_class.rec", ""),
        ("train_part_70_data", ""),
        ("train_part_80_class.rec", " --ratio 0.2"),
        ("train_part_5_data.rec", " --ratio 0.05"),
    ],
)
def test_a_missing_part_names_the_split(tmp_path, name, ratio):
    command = f"python tools/split_dataset/split_dataset_ms1mv3.py --root {tmp_path}{ratio}"
    with pytest.raises(FileNotFoundError, match=f"{name}: no such part of the training set; write it: {command}$"):
        open_train_set(tmp_path / name)


def test_a_missing_index_names_the_command(path):
    path.with_suffix(".idx").unlink()
    with pytest.raises(FileNotFoundError, match=rf"train\.idx: no such file; .*python recordio\.py index {path}$"):
        open_train_set(path)


def test_counts_in_the_config_must_match_the_file(path):
    assert len(open_train_set(path, num_classes=4, num_image=11)) == len(open_train_set(path, 0, 0)) == 11
    with pytest.raises(
        RecordError, match=r"train\.rec: num_classes is 4 in the file, but 5 in .*; set num_classes = 4"
    ):
        open_train_set(path, num_classes=5)
    with pytest.raises(RecordError, match=r"train\.rec: num_image is 11 in the file, but 12"):
        open_train_set(path, num_image=12)


def test_without_a_header_the_config_may_state_more_classes(tmp_path, make_record_set):
    path = make_record_set(tmp_path, LABELS, header=False)
    assert open_train_set(path, num_classes=9).num_classes == 9
    with pytest.raises(RecordError, match="num_image is 11"):
        open_train_set(path, num_image=10)
    with pytest.raises(RecordError, match="key 0 at offset 0: label 3 is not a class; there are 3, 0 to 2"):
        open_train_set(path, num_classes=3).labels()


def test_labels_may_be_vectors(path):
    relabel(path, [[label, 0.5] for label in LABELS])
    dataset = RecordDataset(path)
    assert dataset.labels().tolist() == [dataset.label(row) for row in range(11)] == LABELS
    assert [label for _, label, _ in dataset] == LABELS


@pytest.mark.parametrize("header", [True, "insightface"])
def test_some_classes_without_images_are_legal(tmp_path, make_record_set, header):
    dataset = open_train_set(make_record_set(tmp_path, LABELS, num_classes=8, header=header))
    assert dataset.num_classes == 8 and dataset.labels().tolist() == LABELS


@pytest.mark.parametrize("header", [True, "insightface", False])
def test_sparse_labels_are_refused(tmp_path, make_record_set, header):
    path = make_record_set(tmp_path, [0, 7, 8, 7], header=header)
    why = rf"{path}: 4 images of 3 classes, labels up to 8: most of the 9 class centres .*dense_classes\.py {path}$"
    with pytest.raises(RecordError, match=why):
        open_train_set(path)
    path = make_record_set(tmp_path, [0] * 10 + [18], header=header)  # only all labels tell
    with pytest.raises(RecordError, match="11 images of 2 classes, labels up to 18: most of the 19 class centres"):
        open_train_set(path).labels()


@pytest.mark.parametrize("label", [2.0**24, 2.0**24 + 2, [1e9, 0.5]])
def test_labels_that_float32_cannot_tell_apart_are_refused(tmp_path, make_record_set, label):
    path = make_record_set(tmp_path, LABELS, header=False)
    relabel(path, [*LABELS[:-1], label])
    why = r"train\.rec: key 10 at offset \d+: label \d+ is not a class; float32 tells labels apart only up to 16777215"
    with pytest.raises(RecordError, match=why):
        RecordDataset(path)


@pytest.mark.parametrize("header", [True, "insightface", False])
def test_one_hot_labels_are_refused(tmp_path, make_record_set, header):
    path = make_record_set(tmp_path, LABELS, header=header)
    relabel(path, np.eye(4)[LABELS].tolist())
    with pytest.raises(RecordError, match=r"train\.rec: one-hot labels; write the class itself"):
        RecordDataset(path)
    for numbers in ([1, 0], [0, 0], [-1, 1, 1]):  # may look one-hot behind the classes 0 and 1
        relabel(path, [[label, *numbers] for label in LABELS])
        assert RecordDataset(path).labels().tolist() == LABELS
    relabel(path, [[label % 2, 1, 0.5] for label in LABELS])
    assert RecordDataset(path).labels().tolist() == [label % 2 for label in LABELS]


@pytest.mark.parametrize("label", [4, -1, 1.5, [0.25, 0.75], float("nan"), 1e9])
def test_a_label_outside_the_range_is_named(path, label):
    rewrite(path, lambda key, payload: pack(IRHeader(0, label, 3, 0), unpack(payload)[1]) if key == 3 else payload)
    dataset = RecordDataset(path)
    why = rf"train\.rec: key 3 at offset \d+: label {np.ravel(label)[0]:.10g} is not a class; there are 4, 0 to 3"
    loader = TrainLoader(dataset, 11, "cpu", 0)
    for use in (dataset.labels, lambda: dataset[2], lambda: dataset.label(2), lambda: list(loader)):
        with pytest.raises(RecordError, match=why):
            use()
    assert dataset.label(3) == LABELS[3]


@pytest.mark.parametrize("row", [-1, 11])
def test_rows_outside_the_set_are_refused(path, row):
    for dataset in (RecordDataset(path), SyntheticDataset("synthetic", 4, 11)):
        with pytest.raises(IndexError, match=f"row {row} "):
            dataset[row]
        with pytest.raises(IndexError, match=f"row {row} "):
            dataset.label(row)


def stub_reader(counts, records):
    """A fake reader for `image_layout`, without a file of millions of records. `records` is {key: image bytes}."""

    def read_record(key):
        return IRHeader(2, np.asarray(counts, np.float32), 0, 0) if key == 0 else None, records(key)

    return types.SimpleNamespace(
        path="a.rec",
        idx_path=types.SimpleNamespace(name="a.idx"),
        read_record=read_record,
        offset=lambda key: 0,
        first_missing_key=lambda: None,
    )


class Sized(types.SimpleNamespace):
    def __len__(self):
        return self.size

    def __contains__(self, key):
        return 0 <= key < self.size


@pytest.mark.parametrize("images", [10, 2**24 - 2, 2**24 - 1, 2**24, 2**24 + 1, 17_091_657, 2**25 + 3, 42_474_558])
@pytest.mark.parametrize("classes", [1, 7, 360_232])
@pytest.mark.parametrize("identities", [True, False])
def test_counts_beyond_float32_precision(images, classes, identities):
    end = images + 1
    size = end + classes if identities else end
    reader = Sized(
        size=size,
        **vars(
            stub_reader(
                [end, size if identities else classes], lambda key: b"\xff\xd8\xff" if 1 <= key <= images else b""
            )
        ),
    )
    layout = image_layout(reader)
    assert layout.keys == range(1, images + 1) and layout.num_classes == classes


def write_header(path, counts):
    rewrite(path, lambda key, payload: payload if key else pack(IRHeader(0, counts, 0, 0), b""))


@pytest.mark.parametrize(
    "counts, why",
    [
        ([13, 4], "has keys 0 to 11"),
        ([11, 4], "has keys 0 to 11"),
        ([11, 13], "has keys 0 to 11"),
        ([0, 4], "not counts"),
        ([12, float("nan")], "not counts"),
        ([12, float("inf")], "not counts"),
        ([12.5, 4], "not counts"),
        ([12, 2**25], "float32"),
    ],
)
def test_a_header_that_contradicts_the_index_is_refused(path, counts, why):
    write_header(path, counts)
    with pytest.raises(RecordError, match=rf"train\.rec: key 0 at offset 0: .*{why}"):
        RecordDataset(path)


def test_more_classes_than_images_is_not_read_as_identity_records(path):
    for classes in (12, 13, 22):
        write_header(path, [12, classes])
        assert (len(RecordDataset(path)), RecordDataset(path).num_classes) == (11, classes)


def test_a_header_without_a_class_count(path):
    write_header(path, [12])
    assert (len(RecordDataset(path)), RecordDataset(path).num_classes) == (11, 4)


@pytest.mark.parametrize("header", [True, "insightface"])
def test_a_missing_image_is_not_skipped(tmp_path, make_record_set, header):
    path = make_record_set(tmp_path, LABELS, header=header)
    rewrite(path, lambda key, payload: None if key == 5 else payload)
    with pytest.raises(RecordError, match=r"key 5 is not in train\.idx"):
        RecordDataset(path)


def test_a_truncated_set_is_refused_when_opened(path):
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecordError, match=r"train\.rec: key 11 at offset \d+: .*truncated"):
        RecordDataset(path)


def broken_image(kind, jpeg):
    other_size = np.zeros((113, 112, 3), np.uint8)
    png = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (112, 112, 3), np.uint8))[1].tobytes()
    return {
        "empty": b"",
        "text": b"no image at all",
        "cut": jpeg[: len(jpeg) // 2],
        "header": jpeg[:30],
        "cut png": png[: len(png) // 2],
        "size": cv2.imencode(".png", other_size)[1].tobytes(),
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "header", "cut png", "size"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_named(path, kind, workers):
    def change(key, payload):
        header, jpeg = unpack(payload)
        return pack(header, broken_image(kind, jpeg)) if key == 4 else payload

    rewrite(path, change)
    dataset = RecordDataset(path)
    why = "112 x 113, not 112 x 112" if kind == "size" else "do not decode"
    with pytest.raises(RecordError, match=rf"train\.rec: key 4 at offset \d+: .*{why}"):
        dataset[3]
    with pytest.raises(RecordError, match=rf"train\.rec: key 4 at offset \d+: .*{why}"):
        list(ExtractLoader(dataset, 4, "cpu", workers))


def test_an_error_leaves_no_worker_behind(path):
    rewrite(path, lambda key, payload: payload[:40] if key == 4 else payload)
    gc.collect()
    gc.disable()  # a cycle would keep the loader, and its worker, until some later collection
    try:
        try:
            list(ExtractLoader(RecordDataset(path), 4, "cpu", 1))
        except RecordError as error:
            assert str(error).startswith(str(path)) and "Traceback" not in str(error)
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_png_and_grey_images_decode_to_rgb():
    grey = np.random.default_rng(0).integers(0, 255, (112, 112), np.uint8)
    for encoded in (cv2.imencode(".png", grey)[1], cv2.imencode(".png", cv2.cvtColor(grey, cv2.COLOR_GRAY2BGRA))[1]):
        assert np.array_equal(decode_bgr(encoded), np.stack([grey] * 3, -1))


def test_sets_can_be_pickled_for_spawned_workers(path):
    records = RecordDataset(path)
    records.labels()
    for dataset in (records, SyntheticDataset("synthetic", 3, 10)):
        data = pickle.dumps(dataset)
        copy = pickle.loads(data)
        assert torch.equal(copy[4][0], dataset[4][0]) and copy[4][1:] == dataset[4][1:]
        assert copy.labels().tolist() == dataset.labels().tolist()
    assert len(pickle.dumps(records)) < 1500  # by path: neither the index nor the remembered labels travel


def test_a_set_without_a_header_keeps_no_labels(tmp_path, make_record_set):
    """Its classes are counted from them: eight bytes an image in every rank otherwise."""
    dataset = RecordDataset(make_record_set(tmp_path, LABELS, header=False))
    assert dataset.num_classes == 4 and dataset._labels is None
    assert isinstance(dataset.keys, range) and dataset.labels().tolist() == LABELS
