"""The old model's features in a training run: refused files, rows by number, the rows of a batch."""

import errno
import os
import pickle

import numpy as np
import pytest
import torch

from dataset import SyntheticDataset
from engine.loader import OldRows, TrainLoader
from engine.monitor import init_logging
from old_model.feature_set import FeatureError, FeatureSet
from old_model.old_features import LABELS_SAMPLED, OldFeatures

WIDTH = 6


def training_set(images=11):
    return SyntheticDataset("data/train_part_70_class.rec", num_classes=4, num_image=images)


@pytest.fixture
def stored(tmp_path):
    """A feature set of `training_set()` in files; its features count upwards."""
    files = FeatureSet("f128_r18_softmax_class70", tmp_path)
    files.feature.parent.mkdir()
    np.save(files.feature, np.arange(11 * WIDTH, dtype=np.float32).reshape(11, WIDTH))
    np.save(files.label, training_set().labels())
    return files


def test_rows_are_returned_as_stored(stored):
    old = OldFeatures(training_set(), stored.feature)
    index = np.array([7, 0, 7, 10])
    rows = old.read(index)
    assert rows.dtype == np.float32 and len(old) == 11
    assert rows.tobytes() == np.arange(11.0 * WIDTH, dtype=np.float32).reshape(11, WIDTH)[index].tobytes()
    assert isinstance(old.features.array, np.memmap) and isinstance(old.labels.array, np.memmap)
    rows[:] = 0  # a copy: the file stays
    assert np.load(stored.feature)[7, 0] == 7 * WIDTH


def test_missing_features_name_the_command(stored):
    stored.feature.unlink()
    command = "get_feature.py configs/f128_r18_softmax_class30.py --SD f128_r18_softmax_class70"
    with pytest.raises(FeatureError, match=f"^old_embedding = .*no such file.*{command}"):
        OldFeatures(training_set(), stored.feature)


def test_missing_labels_name_the_command(stored):
    stored.label.unlink()
    with pytest.raises(FeatureError, match="^old_embedding_label = .*class70_label.npy: no such file.*get_feature.py"):
        OldFeatures(training_set(), stored.feature)


def test_an_empty_config_key_is_named(stored):
    with pytest.raises(FeatureError, match="old_embedding is empty"):
        OldFeatures(training_set(), "")


@pytest.mark.parametrize("which", ["feature", "label"])
def test_another_length(stored, which):
    np.save(getattr(stored, which), np.load(getattr(stored, which))[:-1])
    with pytest.raises(FeatureError, match=f"{which}.npy: 10 rows.*11 images.*another record file.*get_feature.py"):
        OldFeatures(training_set(), stored.feature)


@pytest.mark.parametrize(
    "rec, step",
    [
        ("train.rec", "set rec to that, or take .*EXclass/f128_r18_softmax_class100_feature.npy$"),
        ("train_part_30_data.rec", "set rec to that, or take .*OPdata/f128_r18_softmax_data30_feature.npy$"),
        ("mine.rec", "set rec to that, or write features of mine.rec: .* --SD f128_r18_softmax --rec REC"),
    ],
)
def test_features_of_another_set_are_not_to_be_written_again(stored, rec, step):
    """By the name they are of one record file always: the same command would write the same rows."""
    with pytest.raises(FeatureError, match=f"by its name it is of train_part_70_class.rec: {step}"):
        OldFeatures(SyntheticDataset(rec, num_classes=4, num_image=12), stored.feature)


@pytest.mark.parametrize("row", [0, 6, 10])
def test_labels_of_another_set_are_detected_on_opening(stored, row):
    labels = np.load(stored.label)
    labels[row] += 1
    np.save(stored.label, labels)
    with pytest.raises(FeatureError, match=f"row {row} is of class.*another record file.*get_feature.py"):
        OldFeatures(training_set(), stored.feature)


def test_labels_of_a_large_set_are_sampled_on_opening(stored):
    dataset = training_set(5000)
    np.save(stored.feature, np.ones((5000, WIDTH), np.float32))
    np.save(stored.label, dataset.labels())
    read = []
    dataset.label = lambda row: read.append(row) or row % 4
    old = OldFeatures(dataset, stored.feature)
    assert len(read) == LABELS_SAMPLED and {0, 4999} <= set(read)
    old.compare_labels(np.array([4, 2, 4999]), np.array([0, 2, 3]))
    with pytest.raises(FeatureError, match="row 3 is of class 3.*of class 0.*get_feature.py"):
        old.compare_labels(np.array([2, 3]), np.array([2, 0]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e25])
def test_a_row_that_has_no_length(stored, value):
    """In float32 the square of 1e25 is infinite: normalised, the row would be zero."""
    rows = np.load(stored.feature)
    rows[5, 1] = value
    rows[6] = 1e18
    np.save(stored.feature, rows)
    old = OldFeatures(training_set(), stored.feature)
    assert np.isfinite(old.read(np.array([4, 6]))).all()
    with pytest.raises(FeatureError, match="NaN, infinity or a length beyond 1e19 in row 5; .*get_feature.py"):
        old.read(np.array([4, 5]))


def test_a_damaged_file(stored):
    for content in (b"", b"\x93NUMPY\x01\x00", b"\x80\x04K\x01.", stored.feature.read_bytes()[:-4]):
        stored.feature.write_bytes(content)
        with pytest.raises(FeatureError, match="not a readable .npy file.*get_feature.py"):
            OldFeatures(training_set(), stored.feature)


def test_credible_rows(stored):
    path = stored.credible(0.9)

    def opened(images=11):
        return OldFeatures(training_set(images), stored.feature, None, path)

    with pytest.raises(FeatureError, match="no such file.*denoise_credible.py --T 0.9 --SD f128_r18_softmax_class70"):
        opened()
    expected = np.arange(11) % 3 > 0
    np.save(path, expected)
    assert opened().read_credible(np.array([3, 4])).tolist() == [False, True]
    np.save(path, np.ones(12, bool))
    with pytest.raises(FeatureError, match="12 rows.*11 images.*denoise_credible.py"):
        opened()
    np.save(path, np.zeros(11, bool))
    with pytest.raises(FeatureError, match="no row is credible"):
        opened()
    np.save(path, np.ones(11, np.float32))
    with pytest.raises(FeatureError, match="credible.*float32"):
        opened()


# --- Rows from the file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["<f4", "<f2", "<f8", ">f4", "transposed"])
def test_any_dtype_and_order_is_read_as_float32(stored, form):
    rows = np.random.default_rng(0).normal(size=(11, WIDTH))
    rows = np.asfortranarray(rows, np.float32) if form == "transposed" else rows.astype(form)
    np.save(stored.feature, rows)
    old, index = OldFeatures(training_set(), stored.feature), [10, 0, 4, 4]
    assert old.read(np.array(index)).tobytes() == rows[index].astype(np.float32).tobytes()
    assert old.read(np.array([], np.int64)).shape == (0, WIDTH)


@pytest.mark.parametrize("form", ["C", "F"])
def test_rows_and_slices_as_of_an_array(stored, form):
    """Single rows, runs of consecutive ones, backwards, twice the same, none."""
    rows = np.load(stored.feature)
    np.save(stored.feature, np.asarray(rows, order=form))
    features = OldFeatures(training_set(), stored.feature).features
    assert (len(features), features.shape, features.dtype) == (11, (11, WIDTH), np.float32)
    for index in ([3], [2, 3, 4, 9, 10], [10, 9, 0, 1, 2], [4, 4, 5], []):
        index = np.array(index, np.int64)
        assert np.array_equal(features[index], rows[index])
    for part in (slice(None), slice(3, 7), slice(8, 99), slice(5, 5), slice(None, None, 3)):
        assert np.array_equal(features[part], rows[part])


def test_rows_outside_the_file(stored):
    old = OldFeatures(training_set(), stored.feature)
    for row in (11, -1):
        with pytest.raises(IndexError, match=f"class70_feature.npy: row {row} is out of range, the file has 11 rows"):
            old.read(np.array([3, row]))


def test_a_file_truncated_during_the_run(stored):
    old = OldFeatures(training_set(), stored.feature)
    expected = old.read(np.array([2, 4]))
    os.truncate(stored.feature, old.features.array.offset + 5 * WIDTH * 4 + 7)
    assert np.array_equal(old.read(np.array([2, 4])), expected)
    for rows, row in (([2, 5], 5), ([2, 9], 9), ([3, 4, 5, 6], 5)):
        with pytest.raises(
            FeatureError, match=f"class70_feature.npy: truncated before the end of row {row}.*get_feature.py"
        ):
            old.read(np.array(rows))


def test_a_failing_disk(stored, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    old = OldFeatures(training_set(), stored.feature)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(FeatureError, match="row 3 cannot be read .Input/output error.*get_feature.py"):
        old.read(np.array([3]))


def test_a_disk_with_short_reads(stored, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: preadv(file, [views[0][:5]], offset))
    rows = OldFeatures(training_set(), stored.feature).read(np.array([3, 0]))
    assert rows.tolist() == np.arange(11.0 * WIDTH).reshape(11, WIDTH)[[3, 0]].tolist()


# --- Rows of a batch ---------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path):
    """Files for `training_set(96)`: (OldFeatures with credible flags, the features, the flags)."""
    draw = np.random.default_rng(0)
    rows, credible = draw.normal(size=(96, WIDTH)).astype(np.float32), draw.random(96) < 0.7
    for name, array in (("feature", rows), ("label", training_set(96).labels()), ("credible", credible)):
        np.save(tmp_path / f"a_{name}.npy", array)
    old = OldFeatures(training_set(96), tmp_path / "a_feature.npy", credible_path=tmp_path / "a_credible.npy")
    return old, torch.from_numpy(rows), torch.from_numpy(credible)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_has_the_old_rows_of_its_images(many, workers):
    old, stored, credible = many
    loader = TrainLoader(training_set(96), 8, "cpu", workers, seed=3, old=OldRows(old))
    for epoch, start, steps in ((0, 0, 12), (1, 0, 5), (3, 7, 5)):  # one is left early
        loader.set_epoch(epoch, start)
        batches = [batch for _, batch in zip(range(steps), loader)]  # kept: their slots are reused meanwhile
        assert len(batches) == steps
        for batch in batches:
            assert torch.equal(batch.old, stored[batch.index])
            assert torch.equal(batch.credible, credible[batch.index])


def test_without_credible_flags_every_row_is_credible(stored):
    loader = TrainLoader(training_set(), 4, "cpu", 0, old=OldRows(OldFeatures(training_set(), stored.feature)))
    assert all(batch.credible.tolist() == [True] * 4 for batch in loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_of_zeros_is_said_once(tmp_path, workers, capsys):
    """Unless its credible flag tells that it is not to be used."""
    rows, credible = np.ones((96, WIDTH), np.float32), np.ones(96, bool)
    rows[[11, 12, 70]], rows[13], credible[11] = 0, 1e-30, False
    for name, array in (("feature", rows), ("label", training_set(96).labels()), ("credible", credible)):
        np.save(tmp_path / f"a_{name}.npy", array)
    old = OldFeatures(training_set(96), tmp_path / "a_feature.npy", credible_path=tmp_path / "a_credible.npy")
    init_logging(main=True)
    loader = TrainLoader(training_set(96), 96, "cpu", workers, seed=3, old=OldRows(old))
    loader.set_epoch(0)
    (order,) = (batch.index.tolist() for batch in loader)
    list(loader)
    (line,) = capsys.readouterr().out.splitlines()
    first = min((12, 13, 70), key=order.index)
    assert f"a_feature.npy: row {first} is zero, as are 3 of its batch of 96" in line


def test_no_rows_are_read_for_a_method_without_them(many, monkeypatch):
    monkeypatch.setattr(OldFeatures, "read", lambda *_: pytest.fail("rows were read"))
    loader = TrainLoader(training_set(96), 8, "cpu", 0, old=OldRows(many[0], rows=False))
    assert all(batch.old is None and batch.credible is None for batch in loader)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("rows", [True, False])
def test_a_label_mismatch_in_a_batch_ends_the_run(tmp_path, workers, rows):
    labels = training_set(5000).labels().copy()
    labels[3] = 0  # between two of the rows compared on opening
    np.save(tmp_path / "a_feature.npy", np.ones((5000, WIDTH), np.float32))
    np.save(tmp_path / "a_label.npy", labels)
    old = OldFeatures(training_set(5000), tmp_path / "a_feature.npy")
    with pytest.raises(FeatureError, match="row 3 is of class 0.*of class 3.*get_feature.py"):
        list(TrainLoader(training_set(5000), 500, "cpu", workers, old=OldRows(old, rows)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_truncated_under_the_workers_is_reported(many, workers):
    old = many[0]
    loader = TrainLoader(training_set(96), 8, "cpu", workers, old=OldRows(old))
    batches = iter(loader)
    next(batches)
    os.truncate(old.path, old.features.array.offset + 5 * WIDTH * 4)
    with pytest.raises(FeatureError, match="a_feature.npy: truncated before the end of row.*get_feature.py"):
        list(batches)


def test_a_spawned_worker_reopens_the_files(many):
    old, stored, credible = many
    copy = pickle.loads(pickle.dumps(old))
    rows = np.array([5, 90, 5])
    assert torch.equal(torch.from_numpy(copy.read(rows)), stored[rows])
    assert copy.read_credible(rows).tolist() == credible[rows].tolist()
