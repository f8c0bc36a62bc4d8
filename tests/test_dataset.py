"""The training set, its header record and the loaders."""

import gc
import multiprocessing
import pickle
import types

import cv2
import numpy as np
import pytest
import torch

from dataset import (
    ExtractLoader,
    RecordDataset,
    SyntheticDataset,
    TrainLoader,
    _to_input_by_batch,
    decode_bgr,
    open_train_set,
    to_input,
)
from image_layout import image_layout
from recordio import IRHeader, RecordError, RecordReader, RecordWriter, pack, unpack

LABELS = [3, 0, 1, 1, 2, 0, 3, 3, 1, 2, 0]


def rewrite(path, change):
    """Write the set anew with `change(key, payload)` for each record; a payload of None leaves the record out."""
    with RecordReader(path) as reader:
        records = {key: reader.read(key) for key in reader.keys.tolist()}
    with RecordWriter(path) as writer:
        for key, payload in records.items():
            payload = change(key, payload)
            if payload is not None:
                writer.write(key, payload)


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


def test_each_name_of_a_set_opens_it(tmp_path, make_record_set):
    make_record_set(tmp_path / "set.v2.rec", LABELS)
    make_record_set(tmp_path, LABELS[:5])
    for name, images in (("set.v2.rec", 11), ("set.v2", 11), ("train", 5), ("", 5), (".", 5)):
        assert len(open_train_set(tmp_path / name)) == len(open_train_set(str(tmp_path / name))) == images
    with pytest.raises(FileNotFoundError, match="absent"):
        open_train_set(tmp_path / "absent")


def test_counts_that_the_config_states_must_be_the_files(path):
    assert len(open_train_set(path, num_classes=4, num_image=11)) == len(open_train_set(path, 0, 0)) == 11
    with pytest.raises(RecordError, match=r"train\.rec: num_classes is 4 .* says 5; set num_classes = 4"):
        open_train_set(path, num_classes=5)
    with pytest.raises(RecordError, match=r"train\.rec: num_image is 11 .* says 12"):
        open_train_set(path, num_image=12)


def test_without_a_header_the_config_may_state_more_classes(tmp_path, make_record_set):
    path = make_record_set(tmp_path, LABELS, header=False)
    assert open_train_set(path, num_classes=9).num_classes == 9
    with pytest.raises(RecordError, match="num_image is 11"):
        open_train_set(path, num_image=10)
    with pytest.raises(RecordError, match="key 0 at offset 0: label 3 is not a class; there are 3, 0 to 2"):
        open_train_set(path, num_classes=3).labels()


def test_labels_may_be_vectors(path):
    rewrite(path, lambda key, payload: payload if key == 0 else pack(
        IRHeader(0, [LABELS[key - 1], 0.5], key, 0), unpack(payload)[1]))
    dataset = RecordDataset(path)
    assert dataset.labels().tolist() == [dataset.label(row) for row in range(11)] == LABELS
    assert [label for _, label, _ in dataset] == LABELS


def test_a_set_without_header_whose_labels_are_vectors(tmp_path, make_record_set):
    path = make_record_set(tmp_path, LABELS, header=False)
    rewrite(path, lambda key, payload: pack(IRHeader(0, [LABELS[key], 0.5], key, 0), unpack(payload)[1]))
    assert RecordDataset(path).labels().tolist() == LABELS


@pytest.mark.parametrize("label", [4, -1, 1.5, float("nan"), 1e9])
def test_a_label_outside_the_range_is_named(path, label):
    rewrite(path, lambda key, payload: pack(IRHeader(0, label, 3, 0), unpack(payload)[1]) if key == 3 else payload)
    dataset = RecordDataset(path)
    why = rf"train\.rec: key 3 at offset \d+: label {label:.10g} is not a class; there are 4, 0 to 3"
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
    """What `image_layout` asks of a reader, without a file of millions of records. `records` is {key: image bytes}."""
    def read_record(key):
        return IRHeader(2, np.asarray(counts, np.float32), 0, 0) if key == 0 else None, records(key)

    return types.SimpleNamespace(path="a.rec", idx_path=types.SimpleNamespace(name="a.idx"), read_record=read_record,
                                 offset=lambda key: 0, first_missing_key=lambda: None)


class Sized(types.SimpleNamespace):
    def __len__(self):
        return self.size

    def __contains__(self, key):
        return 0 <= key < self.size


@pytest.mark.parametrize("images", [10, 2**24 - 2, 2**24 - 1, 2**24, 2**24 + 1, 17_091_657, 2**25 + 3, 42_474_558])
@pytest.mark.parametrize("classes", [1, 7, 360_232])
@pytest.mark.parametrize("identities", [True, False])
def test_counts_beyond_what_float32_holds(images, classes, identities):
    end = images + 1
    size = end + classes if identities else end
    reader = Sized(size=size, **vars(stub_reader([end, size if identities else classes],
                                                 lambda key: b"\xff\xd8\xff" if 1 <= key <= images else b"")))
    layout = image_layout(reader)
    assert layout.keys == range(1, images + 1) and layout.num_classes == classes


def write_header(path, counts):
    rewrite(path, lambda key, payload: payload if key else pack(IRHeader(0, counts, 0, 0), b""))


@pytest.mark.parametrize("counts, why", [
    ([13, 4], "has the keys 0 to 11"),
    ([11, 4], "has the keys 0 to 11"),
    ([11, 13], "has the keys 0 to 11"),
    ([0, 4], "no counts"),
    ([12, float("nan")], "no counts"),
    ([12, float("inf")], "no counts"),
    ([12.5, 4], "no counts"),
    ([12, 2**25], "float32"),
])
def test_a_header_that_contradicts_the_index_is_refused(path, counts, why):
    write_header(path, counts)
    with pytest.raises(RecordError, match=rf"train\.rec: key 0 at offset 0: .*{why}"):
        RecordDataset(path)


def test_more_classes_than_images_is_no_identity_record(path):
    for classes in (12, 13, 100):
        write_header(path, [12, classes])
        assert (len(RecordDataset(path)), RecordDataset(path).num_classes) == (11, classes)


def test_a_header_may_leave_the_classes_out(path):
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
    return {"empty": b"", "text": b"no image at all", "cut": jpeg[:len(jpeg) // 2], "header": jpeg[:30],
            "cut png": png[:len(png) // 2], "size": cv2.imencode(".png", other_size)[1].tobytes()}[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "header", "cut png", "size"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_not_whole_is_named(path, kind, workers):
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


@pytest.mark.parametrize("mirrored", [None, [True, False, False, True, True]])
def test_to_input_is_the_plain_formula(mirrored):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8))
    expected = []
    for image, mirror in zip(images.permute(0, 3, 1, 2).double(), mirrored or [False] * 5):
        expected.append((image[:, :, torch.arange(111, -1, -1)] if mirror else image) / 255)
    expected = (torch.stack(expected) - 0.5) / 0.5
    mask = None if mirrored is None else torch.tensor(mirrored)
    before = images.clone()
    for result in (to_input(images, mask), _to_input_by_batch(images, mask)):
        assert result.dtype == torch.float32 and result.is_contiguous()
        assert torch.allclose(result.double(), expected, atol=3e-7) and torch.equal(images, before)


def epoch(dataset, batch_size, world_size=1, number=0, start_step=0, workers=0, seed=5):
    """The global batches of an epoch, [(images, labels, index)], put together from all ranks."""
    ranks = []
    for rank in range(world_size):
        loader = TrainLoader(dataset, batch_size, "cpu", workers, seed, rank, world_size)
        loader.set_epoch(number, start_step)
        ranks.append(list(loader))
        assert len(ranks[-1]) == len(loader) - start_step
    return [tuple(torch.cat(parts) for parts in zip(*step)) for step in zip(*ranks)]


def same(some, others):
    return len(some) == len(others) and all(torch.equal(a, b) for x, y in zip(some, others) for a, b in zip(x, y))


@pytest.fixture(scope="module")
def larger(tmp_path_factory, make_record_set):
    return RecordDataset(make_record_set(tmp_path_factory.mktemp("larger"), [i % 7 for i in range(61)]))


def test_batches_are_the_images_normalised_and_sometimes_mirrored(larger):
    plain = {row: (image.permute(2, 0, 1) / 127.5 - 1, label) for image, label, row in larger}
    mirrored = []
    for images, labels, index in epoch(larger, 8) + epoch(larger, 8, number=1):
        assert images.shape == (8, 3, 112, 112) and labels.dtype == index.dtype == torch.int64
        for image, label, row in zip(images, labels.tolist(), index.tolist()):
            upright = torch.allclose(image, plain[row][0], atol=1e-6)
            assert label == plain[row][1] and (upright or torch.allclose(image, plain[row][0].flip(-1), atol=1e-6))
            mirrored.append(not upright)
    assert len(mirrored) == 112 and 30 < sum(mirrored) < 82  # six standard deviations around the half


@pytest.mark.parametrize("world_size, batch_size", [(2, 6), (3, 4), (4, 3)])
def test_any_number_of_ranks_sees_the_same_global_batches(larger, world_size, batch_size):
    assert same(epoch(larger, 12), epoch(larger, batch_size, world_size))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(larger, workers):
    assert same(epoch(larger, 9), epoch(larger, 9, workers=workers))


def test_a_restart_inside_an_epoch_continues_it(larger):
    whole = epoch(larger, 8, number=3)
    assert same(whole[4:], epoch(larger, 8, number=3, start_step=4, workers=1)) and len(whole) == 7
    assert epoch(larger, 8, number=3, start_step=7) == []
    with pytest.raises(ValueError, match="start_step 8"):
        TrainLoader(larger, 8, "cpu", 0).set_epoch(0, 8)


def test_epochs_are_permutations_that_follow_from_seed_and_epoch(larger):
    orders = {}
    for seed, number in ((5, 0), (5, 1), (6, 0), (6, 1)):
        rows = torch.cat([index for _, _, index in epoch(larger, 61, number=number, seed=seed)])
        assert sorted(rows.tolist()) == list(range(61))
        orders[tuple(rows.tolist())] = seed, number
        assert same(epoch(larger, 61, number=number, seed=seed), epoch(larger, 61, number=number, seed=seed))
    assert len(orders) == 4


def test_one_loader_through_many_epochs_some_left_early(larger):
    loader = TrainLoader(larger, 6, "cpu", 2, seed=5)
    for number, steps in ((0, 10), (1, 1), (2, 10), (3, 4), (4, 10)):
        loader.set_epoch(number)
        taken = [batch for batch, _ in zip(loader, range(steps))]
        assert same(taken, epoch(larger, 6, number=number)[:steps])


def test_batches_stay_as_they_were_when_later_ones_arrive(larger):
    kept = list(TrainLoader(larger, 6, "cpu", 1, seed=5))
    assert same(kept, epoch(larger, 6))


def test_the_training_generator_is_left_alone(larger):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(TrainLoader(larger, 30, "cpu", 1))
    assert torch.equal(torch.rand(3), expected)


def test_the_rest_that_fills_no_global_batch_is_dropped(larger):
    assert len(TrainLoader(larger, 10, "cpu", 0)) == 6 and len(TrainLoader(larger, 10, "cpu", 0, world_size=4)) == 1
    with pytest.raises(ValueError, match=r"train\.rec has 61 images, fewer than one global batch of 16 x 4 ranks"):
        TrainLoader(larger, 16, "cpu", 0, world_size=4)
    with pytest.raises(ValueError, match="batch_size is 0"):
        TrainLoader(larger, 0, "cpu", 0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start, stop", [(0, None), (3, 40), (7, 7), (60, 61)])
def test_extraction_keeps_order_and_never_mirrors(larger, workers, start, stop):
    loader = ExtractLoader(larger, 8, "cpu", workers, start, stop)
    batches = list(loader)
    rows = list(range(start, 61 if stop is None else stop))
    assert [len(index) for _, _, index in batches] == [len(rows[i:i + 8]) for i in range(0, len(rows), 8)]
    assert len(loader) == len(batches)
    for images, labels, index in batches:
        for image, label, row in zip(images, labels.tolist(), index.tolist()):
            plain, its_label, _ = larger[row]
            assert row == rows.pop(0) and label == its_label
            assert torch.allclose(image, plain.permute(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert rows == []


def test_extraction_refuses_rows_outside_the_set(larger):
    for start, stop in ((-1, 4), (4, 3), (0, 62)):
        with pytest.raises(ValueError, match=f"rows {start} to {stop} are not within the 61"):
            ExtractLoader(larger, 8, "cpu", 0, start, stop)


def test_sets_can_be_sent_to_spawned_workers(larger):
    larger.labels()
    for dataset in (larger, SyntheticDataset("synthetic", 3, 10)):
        data = pickle.dumps(dataset)
        copy = pickle.loads(data)
        assert torch.equal(copy[4][0], dataset[4][0]) and copy[4][1:] == dataset[4][1:]
        assert copy.labels().tolist() == dataset.labels().tolist()
    assert len(pickle.dumps(larger)) < 1500  # by path: neither the index nor the remembered labels travel


def test_synthetic_sets_have_the_same_surface():
    dataset = open_train_set("synthetic", num_classes=5, num_image=20)
    assert (len(dataset), dataset.num_image, dataset.num_classes) == (20, 20, 5)
    image, label, index = dataset[7]
    assert image.shape == (112, 112, 3) and image.dtype == torch.uint8 and (label, index) == (2, 7)
    assert [dataset.label(row) for row in range(20)] == dataset.labels().tolist() == [row % 5 for row in range(20)]
    assert not torch.equal(image, dataset[8][0]) and torch.equal(image, dataset[7][0])
    assert same(epoch(dataset, 4), epoch(dataset, 2, world_size=2)) and len(epoch(dataset, 4)) == 5
    for counts in ({}, {"num_classes": 5}, {"num_image": 5}):
        with pytest.raises(ValueError, match="needs num_classes and num_image"):
            open_train_set("synthetic", **counts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_what_the_cpu_gives(larger):
    for make in (TrainLoader, ExtractLoader):
        pairs = zip(make(larger, 6, "cuda", 2), make(larger, 6, "cpu", 2), strict=True)
        for (images, labels, index), expected in pairs:
            assert torch.allclose(images.cpu(), expected[0], atol=1e-6)
            assert torch.equal(labels.cpu(), expected[1]) and torch.equal(index, expected[2])
            assert images.is_cuda and images.is_contiguous()
