"""credible_entropy: the entropy against plain loops, what it drops, the command."""

import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from old_model import by_class
from old_model.feature_set import FeatureError, open_array
from tools.get_feature import credible_entropy
from tools.get_feature.credible_entropy import assignment_entropy, low_entropy_rows, means_and_variance

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "tools/get_feature/credible_entropy.py"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(by_class, "CHUNK", 7)
    monkeypatch.setattr(credible_entropy, "BLOCK", 16)


def clustered(labels, width=5, noise=0.6, seed=0):
    random = np.random.default_rng(seed)
    centres = random.normal(size=(max(labels) + 1, width))
    rows = centres[labels] + noise * random.normal(size=(len(labels), width))
    return (rows * random.uniform(0.1, 30, (len(labels), 1))).astype(np.float32)


def entropy_slowly(features, labels):
    """(H of each row, variance)."""
    rows = [row.astype(np.float64) / math.sqrt(sum(row.astype(np.float64) ** 2)) for row in features]
    means = []
    for c in range(max(labels) + 1):
        mine = [row for row, label in zip(rows, labels) if label == c]
        means.append(sum(mine) / len(mine))
    own = [math.dist(row, means[label]) for row, label in zip(rows, labels)]
    variance = sum((d - sum(own) / len(own)) ** 2 for d in own) / len(own)
    entropies = []
    for row in rows:
        distances = [math.dist(row, mean) for mean in means]
        odds = [math.exp(-(d - min(distances)) / variance) for d in distances]
        shares = [one / sum(odds) for one in odds]
        entropies.append(-sum(p * math.log(p) for p in shares if p > 0))
    return np.array(entropies), variance


@settings(deadline=None, max_examples=30)
@given(
    more=st.lists(st.integers(0, 5), min_size=4, max_size=40),
    noise=st.sampled_from([0.3, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_entropy_against_loops(more, noise, seed):
    labels = np.array([*range(6), *more])
    features = clustered(labels, noise=noise, seed=seed)
    means, variance = means_and_variance(features, labels)
    expected, its_variance = entropy_slowly(features, labels)
    assert variance == pytest.approx(its_variance, rel=1e-9)
    entropy = assignment_entropy(features, means, variance)
    np.testing.assert_allclose(entropy, expected, atol=2e-3)
    assert entropy.dtype == np.float32
    # Rows whose entropy is at the threshold itself may fall to either side.
    clear = np.abs(expected - math.log(6) / 2) > 5e-3
    np.testing.assert_array_equal(low_entropy_rows(features, labels)[clear], (expected <= math.log(6) / 2)[clear])


def corners():
    """Eight classes at the corners of a simplex, twenty images near each; then eight images in the middle."""
    random = np.random.default_rng(1)
    labels = np.repeat(np.arange(8), 20)
    near = np.eye(8)[labels] + random.uniform(0.02, 0.5, (160, 1)) * random.normal(size=(160, 8))
    middle = np.ones((8, 8)) + 1e-3 * random.normal(size=(8, 8))
    return np.concatenate([near, middle]).astype(np.float32), np.concatenate([labels, np.arange(8)])


def test_features_between_all_classes_are_dropped_and_others_kept():
    features, labels = corners()
    credible = low_entropy_rows(features, labels)
    assert credible.dtype == bool and credible.shape == (168,)
    assert not credible[160:].any() and credible[:160].mean() > 0.95


def test_rows_of_zeros_are_not_credible_and_none_of_the_others_business():
    labels = np.arange(40) % 4
    features = clustered(labels)
    features[labels == 2] = 0
    features[4] = 0
    there = features.any(axis=1)
    place = np.array([0, 1, -1, 2])
    entropy = assignment_entropy(features, *means_and_variance(features, labels))
    few, of_few = features[there], place[labels[there]]
    np.testing.assert_allclose(entropy[there], assignment_entropy(few, *means_and_variance(few, of_few)))
    found = low_entropy_rows(features, labels)
    assert np.array_equal(found[there], low_entropy_rows(few, of_few)) and not found[~there].any()


def test_the_order_of_rows_does_not_matter():
    features, labels = corners()
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = low_entropy_rows(features[order], labels[order])
    np.testing.assert_array_equal(shuffled, low_entropy_rows(features, labels)[order])


def test_without_variance_every_row_is_its_own_class():
    assert low_entropy_rows(np.eye(4, dtype=np.float32), np.arange(4)).all()


def test_rows_that_are_not_finite_are_refused():
    features, labels = corners()
    features[33, 2] = np.nan
    with pytest.raises(FeatureError, match="row 33 "):
        low_entropy_rows(features, labels)


def save(folder, features, labels):
    (folder / "OPclass").mkdir()
    np.save(folder / "OPclass/old_class70_feature.npy", features)
    np.save(folder / "OPclass/old_class70_label.npy", labels)
    return [sys.executable, str(SCRIPT), "--SD", "old_class70", "--feature_save", str(folder)]


def test_command_writes_what_nccl_reads(tmp_path):
    features, labels = corners()
    done = subprocess.run(save(tmp_path, features, labels), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "OPclass/old_class70_credible_entropy_feature.npy"
    credible = open_array(path, 1, np.bool_)
    np.testing.assert_array_equal(credible, low_entropy_rows(features, labels))
    assert f"wrote {path}: {int(credible.sum())} of 168 rows" in done.stdout


def test_command_names_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        credible_entropy.main(["--SD", "old_class70", "--feature_save", str(tmp_path)])
    error = capsys.readouterr().err
    assert "old_class70_feature.npy: no such file; write it: python tools/get_feature/get_feature.py" in error
