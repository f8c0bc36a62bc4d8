"""The loaders: order, mirroring, normalisation; the same for any number of ranks and workers."""

import numpy as np
import pytest
import torch

from dataset import RecordDataset, _to_input_by_batch, open_train_set, to_input
from engine.loader import ExtractLoader, TrainLoader


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
    """The global batches of an epoch, [(images, labels, index)], concatenated over all ranks."""
    ranks = []
    for rank in range(world_size):
        loader = TrainLoader(dataset, batch_size, "cpu", workers, seed, rank, world_size)
        loader.set_epoch(number, start_step)
        ranks.append([batch[:3] for batch in loader])
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
def test_batches_do_not_depend_on_workers(larger, workers):
    assert same(epoch(larger, 9), epoch(larger, 9, workers=workers))


def test_start_step_continues_an_epoch(larger):
    whole = epoch(larger, 8, number=3)
    assert same(whole[4:], epoch(larger, 8, number=3, start_step=4, workers=1)) and len(whole) == 7
    assert epoch(larger, 8, number=3, start_step=7) == []
    with pytest.raises(ValueError, match="start_step 8"):
        TrainLoader(larger, 8, "cpu", 0).set_epoch(0, 8)


def test_epochs_are_permutations_drawn_from_seed_and_epoch(larger):
    orders = {}
    for seed, number in ((5, 0), (5, 1), (6, 0), (6, 1)):
        rows = torch.cat([index for _, _, index in epoch(larger, 61, number=number, seed=seed)])
        assert sorted(rows.tolist()) == list(range(61))
        orders[tuple(rows.tolist())] = seed, number
        assert same(epoch(larger, 61, number=number, seed=seed), epoch(larger, 61, number=number, seed=seed))
    assert len(orders) == 4


def test_a_loader_survives_epochs_left_early(larger):
    loader = TrainLoader(larger, 6, "cpu", 2, seed=5)
    for number, steps in ((0, 10), (1, 1), (2, 10), (3, 4), (4, 10)):
        loader.set_epoch(number)
        taken = [batch[:3] for batch, _ in zip(loader, range(steps))]
        assert same(taken, epoch(larger, 6, number=number)[:steps])


def test_later_batches_do_not_overwrite_earlier_ones(larger):
    kept = [batch[:3] for batch in TrainLoader(larger, 6, "cpu", 1, seed=5)]
    assert same(kept, epoch(larger, 6))


def test_the_training_generator_is_not_used(larger):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(TrainLoader(larger, 30, "cpu", 1))
    assert torch.equal(torch.rand(3), expected)


def test_the_incomplete_global_batch_is_dropped(larger):
    assert len(TrainLoader(larger, 10, "cpu", 0)) == 6 and len(TrainLoader(larger, 10, "cpu", 0, world_size=4)) == 1
    with pytest.raises(ValueError, match=r"train\.rec has 61 images, fewer than one global batch of 16 x 4 ranks"):
        TrainLoader(larger, 16, "cpu", 0, world_size=4)
    with pytest.raises(ValueError, match="batch_size = 0"):
        TrainLoader(larger, 0, "cpu", 0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start, stop", [(0, None), (3, 40), (7, 7), (60, 61)])
def test_extraction_keeps_order_and_never_mirrors(larger, workers, start, stop):
    loader = ExtractLoader(larger, 8, "cpu", workers, start, stop)
    batches = [batch[:3] for batch in loader]
    rows = list(range(start, 61 if stop is None else stop))
    assert [len(index) for _, _, index in batches] == [len(rows[i : i + 8]) for i in range(0, len(rows), 8)]
    assert len(loader) == len(batches)
    for images, labels, index in batches:
        for image, label, row in zip(images, labels.tolist(), index.tolist()):
            plain, its_label, _ = larger[row]
            assert row == rows.pop(0) and label == its_label
            assert torch.allclose(image, plain.permute(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert rows == []


def test_extraction_rows_out_of_range_are_refused(larger):
    for start, stop in ((-1, 4), (4, 3), (0, 62)):
        with pytest.raises(ValueError, match=f"rows {start} to {stop} are not within the 61"):
            ExtractLoader(larger, 8, "cpu", 0, start, stop)


def test_synthetic_sets_have_the_same_interface():
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


@pytest.mark.gpu
def test_cuda_equals_the_cpu(larger):
    for make in (TrainLoader, ExtractLoader):
        pairs = zip(make(larger, 6, "cuda", 2), make(larger, 6, "cpu", 2), strict=True)
        for batch, expected in pairs:
            assert torch.allclose(batch.images.cpu(), expected.images, atol=1e-6)
            assert torch.equal(batch.labels.cpu(), expected.labels) and torch.equal(batch.index, expected.index)
            assert batch.images.is_cuda and batch.images.is_contiguous()
