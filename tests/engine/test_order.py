"""The shuffle: a permutation at every size, the same wherever one starts, without visible structure."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.order import RowsInOrder, Shuffle, ShuffledRows


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 100))
def test_every_row_comes_once(size, seed, epoch):
    rows = Shuffle(size, seed, epoch).rows(np.arange(size))
    assert rows.dtype == np.int64 and np.array_equal(np.sort(rows), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 5_179_510, 500_000_000, 2**40 + 1])
def test_a_position_needs_no_other(size):
    shuffle = Shuffle(size, 666, 3)
    positions = np.unique(np.linspace(0, size - 1, 1000).astype(np.int64))
    together, mirrored = shuffle.rows(positions), shuffle.mirrored(positions)
    assert len(np.unique(together)) == len(positions) and 0 <= together.min() <= together.max() < size
    again = Shuffle(size, 666, 3)
    for place in range(0, len(positions), 97):
        assert again.rows(positions[place : place + 1]) == together[place]
        assert again.mirrored(positions[place : place + 1]) == mirrored[place]


def chi_square(counts):
    expected = counts.sum() / counts.size
    return ((counts - expected) ** 2 / expected).sum()


def order_looks_random(rows, mirrored):
    """Chi-squares, as deviations from their mean in standard deviations: position x row, neighbours, mirroring."""
    size, cells = len(rows), 20
    places, where = np.arange(size) * cells // size, rows * cells // size
    tables = {
        "position and row": np.histogram2d(places, where, cells)[0],
        "row and the next": np.histogram2d(where[:-1], where[1:], cells)[0],
        "row and the one after": np.histogram2d(where[:-2], where[2:], cells)[0],
        "last bits": np.histogram2d(np.arange(size) % 16, rows % 16, 16)[0],
        "mirrored by row": np.histogram2d(where, mirrored, (cells, 2))[0],
        "mirrored by position": np.histogram2d(places, mirrored, (cells, 2))[0],
    }
    return {name: (chi_square(table) - table.size) / np.sqrt(2 * table.size) for name, table in tables.items()}


@pytest.mark.parametrize("size", [10_007, 65_536, 90_000])
def test_the_order_looks_random(size):
    for seed in (0, 1):
        for epoch in (0, 1):
            shuffle = Shuffle(size, seed, epoch)
            found = order_looks_random(shuffle.rows(np.arange(size)), shuffle.mirrored(np.arange(size)))
            assert all(abs(deviation) < 5 for deviation in found.values()), (seed, epoch, found)
    stepwise = (np.arange(size) * 7919) % size
    assert max(order_looks_random(stepwise, stepwise % 2 == 0).values()) > 50  # the measure finds structure


def test_small_sets_reach_every_order():
    orders = {tuple(Shuffle(4, seed, 0).rows(np.arange(4))) for seed in range(500)}
    assert len(orders) == 24


def test_seeds_and_epochs_differ():
    rows = [Shuffle(1000, seed, epoch).rows(np.arange(1000)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    mirrored = [Shuffle(1000, seed, epoch).mirrored(np.arange(1000)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for first in range(4):
        for second in range(first):
            assert np.count_nonzero(rows[first] == rows[second]) < 10
    assert all(400 < np.count_nonzero(mirrored[0] != other) < 600 for other in mirrored[1:])


@pytest.mark.parametrize("world_size, batch_size", [(1, 12), (2, 6), (3, 4)])
def test_ranks_share_the_same_global_batches(world_size, batch_size):
    whole = ShuffledRows(100, 12, 5, 0, 1)
    plans = [ShuffledRows(100, batch_size, 5, rank, world_size) for rank in range(world_size)]
    for plan in (whole, *plans):
        plan.epoch, plan.start_step = 2, 3
    for (rows, mirrored), *parts in zip(whole, *plans):
        assert np.array_equal(np.concatenate([part[0] for part in parts]), rows)
        assert np.array_equal(np.concatenate([part[1] for part in parts]), mirrored)


def test_rows_in_order():
    found = [rows.tolist() for rows, mirrored in RowsInOrder(4, 3, 12)]
    assert found == [[3, 4, 5, 6], [7, 8, 9, 10], [11]] and len(RowsInOrder(4, 3, 12)) == 3
