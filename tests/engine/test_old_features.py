"""The old model's features in a training run: what is refused, rows by number, rows read ahead."""

import errno
import gc
import os
import threading

import numpy as np
import pytest
import torch

from dataset import SyntheticDataset
from engine import old_features
from engine.feature_files import FeatureError, FeatureSet
from engine.old_features import LABELS_SAMPLED, OldFeatures, load_credible
from loader import ExtractLoader, TrainLoader
from tests.ranks import run_ranks

WIDTH = 6


def training_set(images=11):
    return SyntheticDataset(num_classes=4, num_image=images)


@pytest.fixture
def stored(tmp_path):
    """A feature set of `training_set()` in files; its features count upwards."""
    files = FeatureSet("f128_r18_softmax_class70", tmp_path)
    files.feature.parent.mkdir()
    np.save(files.feature, np.arange(11 * WIDTH, dtype=np.float32).reshape(11, WIDTH))
    np.save(files.label, training_set().labels())
    return files


def test_rows_come_as_they_are_stored(stored):
    old = OldFeatures(stored.feature, training_set(), embedding_size=WIDTH)
    index = torch.tensor([7, 0, 7, 10])
    rows = old[index]
    assert rows.dtype == torch.float32 and len(old) == 11
    assert torch.equal(rows, torch.arange(11.0 * WIDTH).view(11, WIDTH)[index])
    assert isinstance(old.features, np.memmap)
    rows.zero_()    # a copy: the file stays
    assert np.load(stored.feature)[7, 0] == 7 * WIDTH


def test_rows_are_fetched_to_a_device(stored):
    old, index = OldFeatures(stored.feature, training_set()), torch.tensor([3, 3, 0])
    rows = old.fetch(index, torch.device("cpu"))
    assert rows.device.type == "cpu" and torch.equal(rows, old[index])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fetching_to_the_gpu_never_waits_for_it(stored):
    old, index = OldFeatures(stored.feature, training_set()), torch.tensor([3, 3, 0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = old.fetch(index, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rows.is_cuda and torch.equal(rows.cpu(), old[index])


@pytest.mark.parametrize("which", ["feature", "credible"])
def test_files_older_than_their_model(stored, which):
    model = stored.root / "model.pt"
    model.write_bytes(b"")
    np.save(stored.credible(0.9), np.ones(11, bool))
    readers = {
        "feature": lambda: OldFeatures(stored.feature, training_set(), old_model_path=model),
        "credible": lambda: load_credible(stored.credible(0.9), training_set(), model),
    }
    path = {"feature": stored.feature, "credible": stored.credible(0.9)}[which]
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    readers[which]()
    os.utime(model, ns=(later + 1, later + 1))
    with pytest.raises(FeatureError, match=f"{path}: older than old_model_path {model}"):
        readers[which]()
    load_credible("", training_set(), model)


def test_missing_features_name_the_command(stored):
    stored.feature.unlink()
    command = "get_feature.py configs/f128_r18_softmax_class30.py --SD f128_r18_softmax_class70"
    with pytest.raises(FeatureError, match=f"no such file.*{command}"):
        OldFeatures(stored.feature, training_set())


def test_missing_labels_name_the_command(stored):
    stored.label.unlink()
    with pytest.raises(FeatureError, match="class70_label.npy: no such file.*get_feature.py"):
        OldFeatures(stored.feature, training_set())


def test_an_empty_config_key_is_named(stored):
    with pytest.raises(FeatureError, match="old_embedding is empty"):
        OldFeatures("", training_set())


@pytest.mark.parametrize("which", ["feature", "label"])
def test_another_length(stored, which):
    np.save(getattr(stored, which), np.load(getattr(stored, which))[:-1])
    with pytest.raises(FeatureError, match=f"{which}.npy: 10 rows.*11 images.*another record file.*get_feature.py"):
        OldFeatures(stored.feature, training_set())


def test_another_width(stored):
    with pytest.raises(FeatureError, match=f"width {WIDTH}, but embedding_size is 512.*get_feature.py configs/"):
        OldFeatures(stored.feature, training_set(), embedding_size=512)


@pytest.mark.parametrize("row", [0, 6, 10])
def test_another_sets_labels_are_noticed_at_once(stored, row):
    labels = np.load(stored.label)
    labels[row] += 1
    np.save(stored.label, labels)
    with pytest.raises(FeatureError, match=f"row {row} is of class.*another record file.*get_feature.py"):
        OldFeatures(stored.feature, training_set())


def test_a_large_sets_labels_are_sampled_at_first_and_all_held_in_the_batches(stored):
    dataset = training_set(5000)
    labels = dataset.labels().copy()
    labels[3] = 0   # between two samples
    np.save(stored.feature, np.ones((5000, WIDTH), np.float32))
    np.save(stored.label, labels)
    read = []
    dataset.label = lambda row: read.append(row) or row % 4
    old = OldFeatures(stored.feature, dataset)
    assert len(read) == LABELS_SAMPLED and {0, 4999} <= set(read)
    old.check_labels(torch.tensor([4, 2, 4999]), torch.tensor([0, 2, 3]))
    with pytest.raises(FeatureError, match="row 3 is of class 0.*of class 3.*get_feature.py"):
        old.check_labels(torch.tensor([2, 3]), torch.tensor([2, 3]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_labels_on_the_gpu_are_held_when_the_next_batch_comes(stored):
    old = OldFeatures(stored.feature, training_set())
    old.check_labels(torch.tensor([1, 2]), torch.tensor([1, 3]).cuda())
    with pytest.raises(FeatureError, match="row 2"):
        old.check_labels(torch.tensor([1, 2]), torch.tensor([1, 2]).cuda())


def test_a_row_that_is_no_number(stored):
    rows = np.load(stored.feature)
    rows[5, 1] = np.nan
    np.save(stored.feature, rows)
    old = OldFeatures(stored.feature, training_set())
    assert torch.isfinite(old[torch.tensor([4, 6])]).all()
    with pytest.raises(FeatureError, match="row 5.*get_feature.py"):
        old[torch.tensor([4, 5])]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"\x80\x04K\x01."])
def test_a_damaged_file(stored, content):
    stored.feature.write_bytes(content)
    with pytest.raises(FeatureError, match="not a readable .npy file.*get_feature.py"):
        OldFeatures(stored.feature, training_set())


def test_a_file_cut_short(stored):
    whole = stored.feature.read_bytes()
    stored.feature.write_bytes(whole[:-4])
    with pytest.raises(FeatureError, match="not a readable .npy file"):
        OldFeatures(stored.feature, training_set())


def test_credible_rows(stored):
    path, dataset = stored.credible(0.9), training_set()
    with pytest.raises(FeatureError, match="no such file.*denoise_credible.py --T 0.9 --SD f128_r18_softmax_class70"):
        load_credible(path, dataset)
    expected = np.arange(11) % 3 > 0
    np.save(path, expected)
    credible = load_credible(path, dataset)
    assert credible.dtype == torch.bool and credible.tolist() == expected.tolist()
    assert credible[torch.tensor([3, 4])].tolist() == [False, True]
    assert load_credible("", dataset).tolist() == [True] * 11
    with pytest.raises(FeatureError, match="11 rows.*12 images.*denoise_credible.py"):
        load_credible(path, training_set(12))
    np.save(path, np.zeros(11, bool))
    with pytest.raises(FeatureError, match="no row is credible"):
        load_credible(path, dataset)
    np.save(path, np.ones(11, np.float32))
    with pytest.raises(FeatureError, match="holds float32"):
        load_credible(path, dataset)


# --- Rows from the file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["<f4", "<f2", "<f8", ">f4", "transposed"])
def test_any_form_of_file_gives_its_rows_as_float32(stored, form):
    rows = np.random.default_rng(0).normal(size=(11, WIDTH))
    rows = np.asfortranarray(rows, np.float32) if form == "transposed" else rows.astype(form)
    np.save(stored.feature, rows)
    old, index = OldFeatures(stored.feature, training_set()), [10, 0, 4, 4]
    assert old[torch.tensor(index)].numpy().tobytes() == rows[index].astype(np.float32).tobytes()
    assert old[torch.tensor([], dtype=torch.int64)].shape == (0, WIDTH)


def test_rows_outside_the_file(stored):
    old = OldFeatures(stored.feature, training_set())
    for row in (11, -1):
        with pytest.raises(IndexError, match=f"class70_feature.npy: row {row} is outside its 11 rows"):
            old[torch.tensor([3, row])]


def test_a_file_cut_during_the_run(stored):
    old = OldFeatures(stored.feature, training_set())
    expected = old[torch.tensor([2, 4])]
    os.truncate(stored.feature, old.features.offset + 5 * WIDTH * 4 + 7)
    assert torch.equal(old[torch.tensor([2, 4])], expected)
    for row in (5, 9):
        with pytest.raises(FeatureError, match=f"class70_feature.npy: ends before row {row} is whole.*get_feature.py"):
            old[torch.tensor([2, row])]


def test_a_disk_that_fails(stored, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    old = OldFeatures(stored.feature, training_set())
    monkeypatch.setattr(old_features.os, "preadv", fail)
    with pytest.raises(FeatureError, match="row 3 cannot be read .Input/output error.*get_feature.py"):
        old[torch.tensor([3])]


def test_a_disk_that_gives_a_little_at_a_time(stored, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(old_features.os, "preadv", lambda file, views, offset: preadv(file, [views[0][:5]], offset))
    rows = OldFeatures(stored.feature, training_set())[torch.tensor([3, 0])]
    assert torch.equal(rows, torch.arange(11.0 * WIDTH).view(11, WIDTH)[[3, 0]])


# --- Rows read ahead ---------------------------------------------------------------------------------------------


@pytest.fixture
def readers(monkeypatch):
    """The names of the threads that have read rows from a file, one a batch."""
    names, read = [], old_features._RowFile.read

    def noted(self, rows, out):
        names.append(threading.current_thread().name.split("_")[0])
        return read(self, rows, out)

    monkeypatch.setattr(old_features._RowFile, "read", noted)
    return names


@pytest.fixture
def many(tmp_path):
    """Files for `training_set(96)`: (OldFeatures, what is in the file)."""
    rows = np.random.default_rng(0).normal(size=(96, WIDTH)).astype(np.float32)
    np.save(tmp_path / "a_feature.npy", rows)
    np.save(tmp_path / "a_label.npy", training_set(96).labels())
    return OldFeatures(tmp_path / "a_feature.npy", training_set(96)), torch.from_numpy(rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_find_their_rows_read(many, readers, workers):
    old, stored = many
    loader = TrainLoader(training_set(96), 8, "cpu", workers, seed=3)
    loader.read_ahead(old)
    for epoch, start, steps in ((0, 0, 12), (1, 0, 5), (2, 0, 12), (3, 7, 5), (3, 7, 5)):    # some are left early
        loader.set_epoch(epoch, start)
        for _, (_, _, index) in zip(range(steps), loader):
            assert torch.equal(old.fetch(index, "cpu"), stored[index])
        assert epoch == 0 or set(readers) == {"old features"}   # at first it is not known that rows are wanted
        readers.clear()
    assert len(old._ahead.waiting) <= 2 * workers + 2


def test_every_other_row_is_read_at_once(many, readers):
    old, stored = many
    old[[0]]
    rows = [np.arange(start, start + 4) for start in (0, 8, 16)]
    for its in rows:
        old.prefetch(its, 4)
    other = torch.tensor([5, 6])
    assert torch.equal(old[other], stored[other])       # the batches wait on
    assert torch.equal(old[rows[0]], stored[rows[0]]) and torch.equal(old[rows[2]], stored[rows[2]])
    assert not old._ahead.waiting and torch.equal(old[rows[1]], stored[rows[1]])    # was passed over
    assert readers.count("MainThread") == 3


def test_gradient_accumulation_takes_two_batches_a_step(many, readers):
    old, stored = many
    loader = TrainLoader(training_set(96), 8, "cpu", 1)
    loader.read_ahead(old)
    old[[0]]
    batches = iter(loader)
    for _ in range(6):
        indices = [next(batches)[2] for _ in range(2)]
        assert all(torch.equal(old[index], stored[index]) for index in indices)
    assert readers == ["MainThread"] + 12 * ["old features"]


def test_a_method_that_asks_for_no_rows_has_none_read(many, readers):
    old, _ = many
    loader = TrainLoader(training_set(96), 8, "cpu", 0)
    loader.read_ahead(old)
    for _, labels, index in loader:
        old.check_labels(index, labels)
    assert readers == [] and old._ahead.thread is None


def test_rows_that_nobody_takes_do_not_pile_up(many):
    old, stored = many
    old[[0]]
    for start in range(90):
        old.prefetch(np.arange(start, start + 4), 5)
    assert len(old._ahead.waiting) == 5 and torch.equal(old[np.arange(89, 93)], stored[89:93])


def test_the_threads_error_comes_with_the_batch(many):
    old, stored = many
    old[[0]]
    os.truncate(old.path, old.features.offset + 50 * WIDTH * 4)
    for start in (46, 49, 0):
        old.prefetch(np.arange(start, start + 4), 4)
    assert torch.equal(old[np.arange(46, 50)], stored[46:50])
    with pytest.raises(FeatureError, match="a_feature.npy: ends before row 50 is whole.*get_feature.py"):
        old[np.arange(49, 53)]
    assert torch.equal(old[np.arange(4)], stored[:4])
    old.prefetch(np.arange(49, 53), 4)      # the error of a batch that is never asked for is none
    old.prefetch(np.arange(4), 4)
    assert torch.equal(old[np.arange(4)], stored[:4])


def test_workers_forked_beside_the_thread(many):
    old, stored = many
    first, second = (TrainLoader(training_set(96), 8, "cpu", 1, seed=seed) for seed in (0, 1))
    for loader in (first, second):
        loader.read_ahead(old)
        for _, _, index in loader:
            assert torch.equal(old[index], stored[index])
    assert sum(len(index) for _, _, index in ExtractLoader(training_set(96), 8, "cpu", 1)) == 96


def test_the_thread_ends_with_the_features(many):
    old = OldFeatures(many[0].path, training_set(96))
    old[[0]]
    old.prefetch(np.arange(4), 4)
    thread, file = next(iter(old._ahead.thread._threads)), old._file.file
    del old
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(OSError):
        os.fstat(file)


def _leave_with_reads_under_way(path):
    old = OldFeatures(path, training_set(96))
    old[[0]]
    for start in range(0, 96, 4):
        old.prefetch(np.arange(start, start + 4), 99)
    globals()["kept"] = old
    return len(old._ahead.waiting)


def test_a_process_ends_with_reads_under_way(many):
    assert run_ranks(_leave_with_reads_under_way, 1, many[0].path, timeout=60) == [24]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_read_ahead_for_the_gpu_are_pinned(many):
    old, stored = many
    old.fetch(torch.tensor([0]), "cuda")
    old.prefetch(np.arange(4), 4)
    rows = old[np.arange(4)]
    assert rows.is_pinned() and torch.equal(rows, stored[:4])
