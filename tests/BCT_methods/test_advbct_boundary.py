"""AdvBCT's class boundaries: against slow loops, their file, several ranks against one."""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from BCT_methods.AdvBCT.boundary import class_boundaries, default_path, load_boundaries
from core import distributed
from core.manifest import manifest_path
from old_model import by_class
from old_model.feature_set import FeatureError
from tests.ranks import run_ranks

WIDTH, CLASSES = 6, 5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(by_class, "CHUNK", 7)


# --- class boundaries -------------------------------------------------------------------------------------------


def boundaries_slowly(features, labels, num_classes):
    centers = np.zeros((num_classes, features.shape[1]))
    radius, count = np.zeros(num_classes), np.zeros(num_classes, int)
    rows = [feature.astype(np.float64) / math.sqrt(sum(feature.astype(np.float64) ** 2)) for feature in features]
    for c in range(num_classes):
        mine = [row for row, label in zip(rows, labels) if label == c]
        if not mine:
            continue
        centers[c] = sum(mine) / len(mine)
        d = sorted(math.sqrt(sum((row - centers[c]) ** 2)) for row in mine)
        if len(d) >= 4:
            q1, q3 = d[math.floor(len(d) / 4)], d[math.floor(3 * len(d) / 4)]
            d = [x for x in d if q1 - 1.5 * (q3 - q1) <= x <= q3 + 1.5 * (q3 - q1)]
        radius[c], count[c] = max(d), len(d)
    return centers, radius, count


@settings(deadline=None, max_examples=40)
@given(
    labels=st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=60),
    seed=st.integers(0, 1000),
    outliers=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float16]),
)
def test_boundaries_against_loops(labels, seed, outliers, dtype):
    random = np.random.default_rng(seed)
    centres = random.normal(size=(CLASSES, WIDTH)) * 3
    spread = random.uniform(size=(len(labels), 1)) if outliers else 1
    features = centres[labels] + spread * random.normal(size=(len(labels), WIDTH))
    features = (features * random.uniform(0.1, 20, (len(labels), 1))).astype(dtype)
    centers, radius, count = class_boundaries(features, np.array(labels), CLASSES)
    expected = boundaries_slowly(features, labels, CLASSES)
    np.testing.assert_allclose(centers, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(radius, expected[1], rtol=1e-5, atol=1e-6)
    assert count.tolist() == expected[2].tolist()
    assert (centers.dtype, radius.dtype, count.dtype) == (np.float32, np.float32, np.int64)


def one_far_row():
    """Class 1: nine directions near (1, 0, 0), one far off. Class 3: two. Class 0: one. Class 2 and 4: none."""
    angles = np.radians([1, -2, 3, -4, 5, -6, 7, -8, 9])
    near = np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)
    rows = [*near, [-1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 2, 2]]
    return np.array(rows, np.float32), np.array([1] * 10 + [0, 3, 3])


def test_an_outlier_is_dropped_from_the_radius_but_not_from_the_centre():
    features, labels = one_far_row()
    centers, radius, count = class_boundaries(features, labels, CLASSES)
    assert count.tolist() == [1, 9, 0, 2, 0]
    np.testing.assert_allclose(centers[1], features[:10].mean(0), atol=1e-6)  # with the far row, not of length 1
    assert radius[1] == pytest.approx(np.linalg.norm(features[:9] - centers[1], axis=1).max(), abs=1e-6)
    assert np.linalg.norm(features[9] - centers[1]) > 1.7 > radius[1]


def test_boundaries_do_not_depend_on_the_order_of_rows(tmp_path):
    features, labels = one_far_row()
    order = np.random.default_rng(0).permutation(len(labels))
    np.save(tmp_path / "mapped.npy", features[order])
    mapped = class_boundaries(np.load(tmp_path / "mapped.npy", mmap_mode="r"), labels[order], CLASSES)
    for first, second in zip(class_boundaries(features, labels, CLASSES), mapped):
        np.testing.assert_allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("labels", [[0, 1, 5], [0, -1, 1]])
def test_labels_out_of_range_are_refused(labels):
    with pytest.raises(FeatureError, match="labels go from"):
        class_boundaries(np.ones((3, 2), np.float32), np.array(labels), CLASSES)
    with pytest.raises(FeatureError, match="4 features, but 3 labels"):
        class_boundaries(np.ones((4, 2), np.float32), np.array([0, 1, 2]), CLASSES)


# --- the file ---------------------------------------------------------------------------------------------------


class Old:
    """What load_boundaries reads of OldFeatures."""

    def __init__(self, path):
        self.features, self.labels = one_far_row()
        self.path = path
        np.save(path, self.features)


def test_the_file_is_written_once_and_again_for_other_features(tmp_path):
    old, path = Old(tmp_path / "x_feature.npy"), tmp_path / "x_center_radius.npz"
    assert default_path(old.path) == str(path)
    loaded = load_boundaries(path, old, CLASSES)
    loaded = [loaded[0][torch.arange(CLASSES)], *loaded[1:]]
    for array, expected in zip(loaded, class_boundaries(old.features, old.labels, CLASSES)):
        assert torch.equal(array, torch.from_numpy(expected))
    with np.load(path) as file:
        assert {name: file[name].shape for name in file} == {"centers": (5, 3), "radius": (5,), "count": (5,)}
    names = sorted(file.name for file in tmp_path.iterdir() if "radius" in file.name)
    assert names == [path.name, f"{path.name}.json"]
    stamp = path.stat().st_mtime_ns
    load_boundaries(path, old, CLASSES)
    assert path.stat().st_mtime_ns == stamp
    old.features = -old.features
    np.save(old.path, old.features)
    os.utime(old.path, (1, 1))  # older by its time, as `cp -p` may leave it
    torch.testing.assert_close(load_boundaries(path, old, CLASSES)[0][torch.arange(CLASSES)], -loaded[0])


def test_a_wrong_file_is_named(tmp_path):
    old, path = Old(tmp_path / "x_feature.npy"), tmp_path / "mine.npz"
    load_boundaries(path, old, CLASSES)
    with pytest.raises(FeatureError, match=r"mine.npz: centres \[5, 3\], but .* has 6 classes"):
        load_boundaries(path, old, 6)
    manifest_path(path).unlink()  # else the file would be made again
    for content in (b"", b"no zip at all", path.read_bytes()[:300], old.path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(FeatureError, match="mine.npz: not a readable file .* delete it"):
            load_boundaries(path, old, CLASSES)


class ManyOld:
    def __init__(self, path):
        random = np.random.default_rng(0)
        self.labels = random.integers(0, 40, 300)
        self.labels[self.labels == 7] = 8  # a class without features
        self.features = random.normal(size=(300, 3)).astype(np.float32)
        self.path = path


def boundaries_on_rank(folder):
    """`(centres, radius, count)` by a file that the ranks write together; the shard's rows; a batch of centres."""
    by_class.CHUNK, by_class.BUCKET = 7, 12
    old = ManyOld(f"{folder}/x_feature.npy")
    centers, radius, count = load_boundaries(f"{folder}/{distributed.world_size()}.npz", old, 40)
    batch = torch.arange(40)[distributed.rank() :: distributed.world_size()][:13]
    return centers[torch.arange(40)], radius, count, len(centers.shard), centers[batch], batch


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_write_the_boundaries_of_one(tmp_path, ranks):
    old = ManyOld(tmp_path / "x_feature.npy")
    np.save(old.path, old.features)
    expected = class_boundaries(old.features, old.labels, 40)
    shards = 0
    for centers, radius, count, shard, rows, batch in run_ranks(boundaries_on_rank, ranks, str(tmp_path)):
        np.testing.assert_allclose(centers, expected[0], rtol=2e-7, atol=1e-9)  # a digit of float32
        np.testing.assert_allclose(radius, expected[1], rtol=2e-7)
        assert count.tolist() == expected[2].tolist()
        assert torch.equal(rows, centers[batch])
        shards += shard
    assert shards == 40 and not centers[7].any()
    alone = boundaries_on_rank(str(tmp_path))
    for one, other in zip(alone, expected):
        np.testing.assert_array_equal(one, other)
