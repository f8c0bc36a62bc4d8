"""get_feature, get_avg_feature, denoise_credible: formulas against plain loops, commands on small record files."""

import math
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import backbones
from dataset import RecordDataset
from old_model import by_class
from old_model.feature_set import FeatureError, FeatureSet
from tools.get_feature import denoise_credible, get_avg_feature, get_feature
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
    assert credible.sum() == 11


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, 90])
def test_ratios_that_are_none(ratio):
    with pytest.raises(FeatureError, match="--T"):
        credible_rows(np.ones((3, 2), np.float32), np.zeros(3, int), ratio)


# --- The commands ------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, make_record_set):
    """A workspace with a trained tiny model and three record files. Returns its config's path."""
    data = tmp_path / "data"
    data.mkdir()
    make_record_set(data / "train_part_30_class.rec", [0, 0, 1])
    make_record_set(data / "train_part_70_class.rec", [0, 1, 1, 2, 0, 2, 2])
    make_record_set(data / "train.rec", [0, 0, 1, 2, 3, 3, 4, 2, 4, 4])
    config = tmp_path / "old_tiny_arc_class30.py"
    config.write_text(f"""
from easydict import EasyDict
config = EasyDict()
config.workspace = {str(tmp_path)!r}
config.network = "tiny"
config.embedding_size = 8
config.batch_size = 3
config.num_workers = 0
config.rec = "data/train_part_30_class.rec"
""")
    torch.manual_seed(0)
    (tmp_path / "work_dirs" / "old_tiny_arc_class30").mkdir(parents=True)
    # The head that softmax training adds stays out of the features.
    model = backbones.get_model("tiny", num_features=8, num_classes=2)
    torch.save(model.state_dict(), tmp_path / "work_dirs" / "old_tiny_arc_class30" / "model.pt")
    return config


def model_features(place, rec):
    model = backbones.load_backbone(place.parent / "work_dirs" / place.stem / "model.pt", "tiny")
    dataset = RecordDataset(place.parent / "data" / rec)
    with torch.no_grad():
        images = [(dataset[row][0].permute(2, 0, 1)[None] / 255 - 0.5) / 0.5 for row in range(len(dataset))]
        return np.concatenate([model(image).numpy() for image in images]), dataset.labels()


@pytest.mark.parametrize(
    "part, rec",
    [("class30", "train_part_30_class.rec"), ("class70", "train_part_70_class.rec"), ("class100", "train.rec")],
)
def test_get_feature_embeds_the_set_of_the_name(place, part, rec):
    name = f"old_tiny_arc_{part}"
    get_feature.main([str(place), "--SD", name])
    files = FeatureSet(name, place.parent / "feature_save")
    features, labels = model_features(place, rec)
    np.testing.assert_allclose(np.load(files.feature), features, atol=1e-5)
    np.testing.assert_array_equal(np.load(files.label), labels)


def test_the_three_tools_in_a_row(place):
    files = FeatureSet("old_tiny_arc_class70", place.parent / "feature_save")
    get_avg_feature.main([str(place), "--SD", files.name])  # extracts first
    written = files.feature.stat().st_mtime_ns
    features, labels = np.load(files.feature), np.load(files.label)
    np.testing.assert_allclose(np.load(files.avg_feature), class_means_slowly(features, labels), atol=1e-6)

    files.avg_feature.unlink()
    get_avg_feature.main(["--SD", files.name, "--feature_save", str(files.root)])  # from the files alone
    assert np.load(files.avg_feature).shape == (3, 8)
    denoise_credible.main(["--T", "0.5", "--SD", files.name, "--feature_save", str(files.root)])
    credible = np.load(files.credible(0.5))
    assert credible.dtype == bool and files.credible(0.5).name == "old_tiny_arc_class70_credible_ratio_50_feature.npy"
    np.testing.assert_array_equal(np.bincount(labels, credible), [1, 1, 2])
    denoise_credible.main([str(place), "--SD", files.name])
    assert np.load(files.credible(0.9)).all()
    assert files.feature.stat().st_mtime_ns == written


def test_features_are_made_again_when_the_model_has_changed(place, capsys):
    arguments = [str(place), "--SD", "old_tiny_arc_class70"]
    files = FeatureSet("old_tiny_arc_class70", place.parent / "feature_save")
    model = place.parent / "work_dirs" / place.stem / "model.pt"
    get_feature.main(arguments)
    before, written = np.load(files.feature), files.feature.stat().st_mtime_ns

    get_feature.main(arguments)
    assert "kept, it is of" in capsys.readouterr().out and files.feature.stat().st_mtime_ns == written
    get_feature.main([*arguments, "--force"])
    assert files.feature.stat().st_mtime_ns > written
    np.testing.assert_array_equal(np.load(files.feature), before)

    torch.manual_seed(1)
    torch.save(backbones.get_model("tiny", num_features=8).state_dict(), model)
    os.utime(model, (1, 1))  # older by its time, as `cp -p` may leave it
    get_avg_feature.main(arguments)
    assert np.abs(np.load(files.feature) - before).max() > 0.01


def test_command_line_overrides_and_an_old_launchers_argument(place, tmp_path):
    files = FeatureSet("old_tiny_arc_class70", tmp_path / "other")
    get_feature.main(
        ["--local_rank=0", str(place), "--SD", files.name, "--batch_size", "5", "--feature_save", str(files.root)]
    )
    features, _ = model_features(place, "train_part_70_class.rec")
    np.testing.assert_allclose(np.load(files.feature), features, atol=1e-5)


def refused(capsys, function, *arguments):
    with pytest.raises(SystemExit) as stop:
        function.main([str(argument) for argument in arguments])
    assert stop.value.code not in (0, None)
    return capsys.readouterr().err


def test_what_get_feature_refuses(place, capsys):
    config = place.read_text()
    assert "--SD old_tiny_arc_class70" in refused(capsys, get_feature, place, "--SD", "other_arc_class70")
    assert "--SD old_tiny_arc_class70" in refused(capsys, get_feature, place, "--SD", "old_tiny_arc_data70")
    assert "class70" in refused(capsys, get_feature, place, "--SD", "old_tiny_arc")
    assert "batch_size" in refused(capsys, get_feature, place, "--SD", "old_tiny_arc_class70", "--batchsize", "5")
    assert "give it first" in refused(capsys, denoise_credible, "--SD", "old_tiny_arc_class70", "--batch_size=5")

    place.write_text(config.replace("embedding_size = 8", "embedding_size = 16"))
    error = refused(capsys, get_feature, place, "--SD", "old_tiny_arc_class70")
    assert "gives 8 features, but embedding_size is 16" in error
    place.write_text(config)
    (place.parent / "data" / "train_part_70_class.rec").unlink()
    assert "split_dataset_ms1mv3.py --root" in refused(capsys, get_feature, place, "--SD", "old_tiny_arc_class70")
    (place.parent / "work_dirs" / place.stem / "model.pt").unlink()
    error = refused(capsys, get_feature, place, "--SD", "old_tiny_arc_class100")
    assert f"train_old_arc.py {place} --workspace {place.parent}" in error
    (place.parent / "data" / "train.rec").unlink()
    error = refused(capsys, get_feature, place, "--SD", "old_tiny_arc_class100")
    assert "train.rec: no such file; put MS1M-V3's" in error and "split" not in error
    assert not (place.parent / "feature_save").exists()


def test_what_the_others_refuse(place, capsys):
    for function in (get_avg_feature, denoise_credible):
        error = refused(capsys, function, "--SD", "old_tiny_arc_class70", "--feature_save", place.parent)
        assert "no such file" in error and "get_feature.py" in error and "Traceback" not in error
    get_feature.main([str(place), "--SD", "old_tiny_arc_class70"])
    error = refused(capsys, denoise_credible, place, "--T", "90", "--SD", "old_tiny_arc_class70")
    assert "--T 90" in error


def test_a_config_of_all_data_names_both_kinds(place):
    config = place.with_name("new_tiny_arc_data100.py")
    config.write_text(place.read_text() + 'config.output = "work_dirs/old_tiny_arc_class30"\n')
    for name in ("new_tiny_arc_data100", "new_tiny_arc_class100"):
        get_feature.main([str(config), "--SD", name])
        assert FeatureSet(name, place.parent / "feature_save").feature.is_file()


def test_two_ranks_by_the_launcher_from_another_directory(place):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.launch",
        "--nproc_per_node=2",
        "--nnodes=1",
        f"--master_port={port}",
        str(REPO / "tools" / "get_feature" / "get_avg_feature.py"),
        place.name,
        "--SD",
        "old_tiny_arc_class70",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command,
        cwd=place.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launcher:
        try:
            out, err = launcher.communicate(timeout=120)
        except BaseException:
            os.killpg(launcher.pid, signal.SIGKILL)  # the ranks too
            raise
    assert launcher.returncode == 0, err
    files = FeatureSet("old_tiny_arc_class70", place.parent / "feature_save")
    features, labels = model_features(place, "train_part_70_class.rec")
    np.testing.assert_allclose(np.load(files.feature), features, atol=1e-5)
    np.testing.assert_array_equal(np.load(files.label), labels)
    np.testing.assert_allclose(np.load(files.avg_feature), class_means_slowly(features, labels), atol=1e-5)
    assert out.count("wrote") == 2  # one rank speaks
