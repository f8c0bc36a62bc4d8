"""Class means and credible rows against plain loops."""

import math
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from old_model import by_class
from old_model.feature_set import FeatureError
from tests.ranks import run_ranks
from tools.get_feature.credible_entropy import low_entropy_rows
from tools.get_feature.denoise_credible import credible_rows
from tools.get_feature.get_avg_feature import class_means

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(by_class, "CHUNK", 7)


def clustered(labels, width=5, seed=0):
    """Features around one centre a class, of very different lengths."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(max(labels) + 1, width))
    rows = centres[labels] + 0.7 * random.normal(size=(len(labels), width))
    return (rows * random.uniform(0.1, 30, (len(labels), 1))).astype(np.float32)


def class_means_slowly(features, labels):
    rows = []
    for c in range(max(labels) + 1):
        mine = [feature.astype(np.float64) for feature, label in zip(features, labels) if label == c]
        mean = sum(mine) / len(mine)
        rows.append(mean / math.sqrt(sum(mean * mean)))
    return np.array(rows)


def credible_rows_slowly(features, labels, keep):
    """keep: for n images, how many are credible."""
    rows = np.array([feature.astype(np.float64) / np.linalg.norm(feature.astype(np.float64)) for feature in features])
    for dimension in range(rows.shape[1]):
        rows[:, dimension] /= np.linalg.norm(rows[:, dimension])
    credible = np.zeros(len(labels), bool)
    for c in set(labels.tolist()):
        mine = [row for row in range(len(labels)) if labels[row] == c]
        mean = sum(rows[row] for row in mine) / len(mine)
        mine.sort(key=lambda row: np.float32(sum((rows[row] - mean) ** 2)))
        credible[mine[: keep(len(mine))]] = True
    return credible


any_labels = st.lists(st.integers(0, 5), min_size=1, max_size=40).map(
    lambda labels: np.unique(labels, return_inverse=True)[1].reshape(-1)  # no class without images
)


# --- Class means -------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None, derandomize=True)
@given(labels=any_labels, seed=st.integers(0, 99))
def test_class_means_equal_the_plain_loop(labels, seed):
    features = clustered(labels, seed=seed)
    means = class_means(features, labels)
    assert means.dtype == np.float32
    np.testing.assert_allclose(means, class_means_slowly(features, labels), atol=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(labels=any_labels, seed=st.integers(0, 99))
def test_class_means_follow_the_classes_not_the_rows(labels, seed):
    features, random = clustered(labels, seed=seed), np.random.default_rng(seed)
    order, renamed = random.permutation(len(labels)), random.permutation(labels.max() + 1)
    means = class_means(features, labels)
    np.testing.assert_allclose(class_means(features[order], labels[order]), means, atol=1e-6)
    np.testing.assert_allclose(class_means(features, renamed[labels])[renamed], means, atol=1e-6)
    np.testing.assert_allclose(class_means(3 * features, labels), means, atol=1e-6)


def test_long_features_weigh_more():
    # The mean is of the features as they are stored; it is normalised, they are not.
    features = np.array([[3, 0], [0, 1]], np.float32)
    means = class_means(features, np.array([0, 0]))
    np.testing.assert_allclose(means, [[3 / math.sqrt(10), 1 / math.sqrt(10)]], atol=1e-6)


def test_many_small_rows_beside_a_large_one_are_not_lost():
    # In float32 a sum of 2^24 swallows every 1.
    features = np.ones((1001, 2), np.float32)
    features[0] = [2.0**24, 0]
    mean = class_means(features, np.zeros(1001, np.int64))[0]
    np.testing.assert_allclose(mean[1] / mean[0], 1000 / (2.0**24 + 1000), rtol=1e-6)


@pytest.mark.parametrize(
    "labels, num_classes, message",
    [
        ([0, 0, 2, 2], None, r"class 1 has no image \(1 of 3"),
        ([0, 0, 1, 1], 4, r"class 2 has no image \(2 of 4"),
        ([0, 0, 1, 4], 4, "labels go from 0 to 4, but the record file has 4 classes"),
        ([0, 0, 1, -1], None, "labels go from -1 to 1"),
        ([0, 1, 2, 10**15], None, "there are 4 images"),
    ],
)
def test_labels_that_do_not_fit(labels, num_classes, message):
    with pytest.raises(FeatureError, match=message):
        class_means(np.ones((4, 2), np.float32), np.array(labels), num_classes)


def test_features_without_a_mean():
    with pytest.raises(FeatureError, match="class 1.*sum to zero"):
        class_means(np.array([[1, 0], [1, 0], [-1, 0]], np.float32), np.array([0, 1, 1]))
    features = np.ones((20, 2), np.float32)
    features[16, 1] = np.inf
    for function, arguments in ((class_means, ()), (credible_rows, (0.9,))):
        with pytest.raises(FeatureError, match="row 16 .*not finite"):
            function(features, np.zeros(20, int), *arguments)


# --- Credible rows -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(labels=any_labels, seed=st.integers(0, 99), tenths=st.integers(1, 10))
def test_credible_rows_equal_the_plain_loop(labels, seed, tenths):
    features = clustered(labels, seed=seed)
    expected = credible_rows_slowly(features, labels, lambda n: (tenths * n + 9) // 10)
    np.testing.assert_array_equal(credible_rows(features, labels, tenths / 10), expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(labels=any_labels, seed=st.integers(0, 99))
def test_credible_rows_do_not_depend_on_order_length_or_class_numbers(labels, seed):
    features, random = clustered(labels, seed=seed), np.random.default_rng(seed)
    # Two rows of one class are equally far from their mean, so that their order decides.
    alone = np.bincount(labels)[labels] != 2
    credible = credible_rows(features, labels, 0.5)
    order = random.permutation(len(labels))
    reordered = credible_rows(features[order], labels[order], 0.5)
    np.testing.assert_array_equal(reordered[alone[order]], credible[order][alone[order]])
    scale = 2.0 ** random.integers(-9, 9, (len(labels), 1))
    np.testing.assert_array_equal(credible_rows((features * scale).astype(np.float32), labels, 0.5), credible)
    np.testing.assert_array_equal(credible_rows(features, 1000 - 7 * labels, 0.5)[alone], credible[alone])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(labels=any_labels, seed=st.integers(0, 99))
def test_a_larger_share_contains_the_smaller(labels, seed):
    features = clustered(labels, seed=seed)
    shares = [credible_rows(features, labels, ratio) for ratio in (0.1, 0.4, 0.7, 1.0)]
    for smaller, larger in zip(shares, shares[1:]):
        assert not (smaller & ~larger).any()
    assert shares[-1].all()
    assert (np.bincount(labels, shares[0]) >= 1).all()  # some of each class, however small


@pytest.mark.parametrize(
    "ratio, count, kept",
    [
        (0.9, 10, 9),
        (0.9, 11, 10),
        (0.9, 1, 1),
        (0.7, 10, 7),
        (0.07, 100, 7),
        (0.55, 20, 11),
        (0.3, 10, 3),
        (0.1, 3, 1),
        (0.29, 100, 29),
        (1 / 3, 9, 3),
        (1.0, 6, 6),
    ],
)
def test_the_share_is_rounded_up_as_it_is_written(ratio, count, kept):
    features = clustered(np.zeros(count, int))
    assert credible_rows(features, np.zeros(count, int), ratio).sum() == kept


def test_the_outlier_goes():
    features = np.array([[1.0, 0.2, 0.1]], np.float32) + np.linspace(0, 0.01, 10, dtype=np.float32)[:, None]
    features[4] = [-1, 2, 1]
    assert np.flatnonzero(~credible_rows(features, np.zeros(10, int), 0.9)).tolist() == [4]


def test_every_dimension_weighs_alike():
    # In the first dimension all rows are large and differ by 0.2; in the second they are tiny and one differs by its
    # all. Without the scaling the first decides.
    rows = [[1.0, 0.001, 1], [1.2, 0.001, 1], [1.0, 0.001, 1], [1.2, 0.001, 1], [1.1, -0.005, 1]]
    features = np.array(rows, np.float32)
    assert np.flatnonzero(~credible_rows(features, np.zeros(5, int), 0.8)).tolist() == [4]


def test_of_equals_the_first_rows_stay():
    row = np.array([[0.3, 0.1, -0.7]], np.float32)
    features = np.concatenate([np.tile(row, (20, 1)), np.tile(-row, (20, 1))])
    labels = np.repeat([0, 1], 20)
    expected = np.tile(np.arange(20) < 10, 2)
    np.testing.assert_array_equal(credible_rows(features, labels, 0.5), expected)
    order = np.random.default_rng(0).permutation(40)
    shuffled = credible_rows(features[order], labels[order], 0.5)
    for c in (0, 1):
        assert shuffled[labels[order] == c].tolist() == [True] * 10 + [False] * 10


def test_rows_and_dimensions_of_zeros():
    features = clustered(np.zeros(12, int))
    features[:, 2] = 0
    features[5] = 0
    credible = credible_rows(features, np.zeros(12, int), 0.9)
    assert credible.sum() == 10 and not credible[5]  # ceil(0.9 · 11) of those that have a feature


def test_a_class_without_features_has_a_mean_of_zeros():
    labels = np.arange(12) % 3
    features = clustered(labels)
    features[labels == 1] = 0
    features[0] = 0
    means = class_means(features, labels)
    there = features.any(axis=1)
    assert not means[1].any()
    for label in (0, 2):
        total = features[there & (labels == label)].sum(axis=0, dtype=np.float64)
        np.testing.assert_allclose(means[label], total / np.linalg.norm(total), atol=1e-6)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, 90])
def test_ratios_that_are_none(ratio):
    with pytest.raises(FeatureError, match="--T"):
        credible_rows(np.ones((3, 2), np.float32), np.zeros(3, int), ratio)


def on_rank(seed):
    by_class.CHUNK, by_class.BUCKET = 7, 30
    labels = np.random.default_rng(seed).integers(0, 12, 150)
    labels[:12] = np.arange(12)
    features = clustered(labels, seed=seed)
    features[100] = features[99]  # a tie, where both are of one class
    labels[99] = labels[100]
    found = [
        class_means(features, labels),
        credible_rows(features, labels - 3, 0.6),
        low_entropy_rows(features, labels),
    ]
    return [None if one is None else torch.from_numpy(one) for one in found]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_rows_and_find_the_same(ranks):
    for seed in (0, 1):
        means, credible, low = on_rank(seed)
        assert 60 < credible.sum() < 150
        results = run_ranks(on_rank, ranks, seed)
        for theirs in results:
            torch.testing.assert_close(theirs[0], means, rtol=2e-7, atol=1e-9)  # a digit of float32
        assert torch.equal(results[0][1], credible) and torch.equal(results[0][2], low)
        assert all(other[1:] == [None, None] for other in results[1:])
