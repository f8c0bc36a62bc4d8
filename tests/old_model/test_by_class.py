"""Class means of unit rows, and distances to them, against plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from old_model import by_class
from old_model.by_class import ClassMeans, row_chunks, squared_distances_to_means
from old_model.feature_set import FeatureError

CLASSES, WIDTH = 6, 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(by_class, "CHUNK", 7)


def unit_class_means(features, labels, num_classes, squares=None):
    classes = ClassMeans(features, labels, num_classes, squares=squares)
    means = np.zeros((num_classes, features.shape[1]))
    for part, totals in classes.totals():
        means[part] = totals / np.maximum(classes.counts[part], 1)[:, None]
    np.testing.assert_array_equal(means[classes.classes], classes.means)
    return means


def unit_rows(features):
    return [[value / math.hypot(*row) for value in row] for row in features.astype(np.float64).tolist()]


@settings(deadline=None, max_examples=40)
@given(
    labels=st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=40),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_means_squares_and_distances_against_loops(labels, seed, dtype):
    random = np.random.default_rng(seed)
    features = (random.normal(size=(len(labels), WIDTH)) * random.uniform(0.1, 30, (len(labels), 1))).astype(dtype)
    before, rows = features.copy(), unit_rows(features)
    squares = np.zeros(WIDTH)
    means = unit_class_means(features, np.array(labels), CLASSES, squares)
    for c in range(CLASSES):
        mine = [row for row, label in zip(rows, labels) if label == c]
        expected = [sum(column) / len(mine) for column in zip(*mine)] if mine else [0] * WIDTH
        np.testing.assert_allclose(means[c], expected, atol=1e-12)
    np.testing.assert_allclose(squares, [sum(value**2 for value in column) for column in zip(*rows)], atol=1e-12)
    np.testing.assert_array_equal(unit_class_means(features, np.array(labels), CLASSES), means)

    weights = random.uniform(0, 3, WIDTH)
    for given_weights, factors in ((None, [1] * WIDTH), (weights, weights)):
        expected = [
            sum(w * (a - b) ** 2 for w, a, b in zip(factors, row, means[label])) for row, label in zip(rows, labels)
        ]
        distances = squared_distances_to_means(features, np.array(labels), means, given_weights)
        assert distances.dtype == np.float64
        np.testing.assert_allclose(distances, expected, atol=1e-12)
    np.testing.assert_array_equal(features, before)


def test_a_row_of_zeros_is_no_feature():
    features, labels = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([1, 1])
    means = unit_class_means(features, labels, 2)
    np.testing.assert_allclose(means, [[0, 0], [0.6, 0.8]])
    np.testing.assert_allclose(squared_distances_to_means(features, labels, means), [0, np.nan], atol=1e-12)


def test_a_non_finite_row_is_named():
    features, labels = np.ones((20, 2)), np.zeros(20, int)
    features[16, 1] = np.nan
    with pytest.raises(FeatureError, match="row 16 .*not finite"):
        unit_class_means(features, labels, 1)
    with pytest.raises(FeatureError, match="row 16 .*not finite"):
        list(row_chunks(features, np.arange(0, 20, 2)))


def test_some_rows_of_a_file(tmp_path):
    features, picked = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32), np.arange(1, 40, 2)
    features[[0, 5]] = np.nan
    np.save(tmp_path / "x_feature.npy", features)
    mapped = np.load(tmp_path / "x_feature.npy", mmap_mode="r")
    with pytest.raises(FeatureError, match=r"x_feature.npy: row 5 is not finite; rewrite it: python .*get_feature.py"):
        list(row_chunks(mapped, picked))
    picked = np.delete(picked, 2)
    parts = list(row_chunks(mapped, picked))
    assert np.concatenate([part for part, _ in parts]).tolist() == picked.tolist() and len(parts) == 3
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in parts]), features[picked].astype(np.float64))


@pytest.mark.parametrize("squares", [False, True])
def test_the_number_of_threads_changes_no_digit(squares):
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(500, WIDTH)), random.integers(0, CLASSES, 500)
    found = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        means = unit_class_means(features, labels, CLASSES, np.zeros(WIDTH) if squares else None)
        found.append((means, squared_distances_to_means(features, labels, means)))
    torch.set_num_threads(1)
    for one, other in zip(*found):
        np.testing.assert_array_equal(one, other)
