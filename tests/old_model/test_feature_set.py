"""Feature files: names, the commands that write them, and their age against the old model's."""

import errno

import numpy as np
import pytest

from old_model import feature_set
from old_model.feature_set import FeatureError, FeatureSet, command_for, open_array, open_feature_set, save_array


@pytest.mark.parametrize(
    "name, scenario, record",
    [
        ("f128_r18_softmax_class30", "OPclass", "train_part_30_class.rec"),
        ("f128_r18_softmax_class70", "OPclass", "train_part_70_class.rec"),
        ("f128_r18_softmax_class100", "EXclass", "train.rec"),
        ("f512_r18_arc_data30", "OPdata", "train_part_30_data.rec"),
        ("f512_r18_arc_data70", "OPdata", "train_part_70_data.rec"),
        ("f512_r18_arc_data100", "EXdata", "train.rec"),
    ],
)
def test_files_of_a_name(tmp_path, name, scenario, record):
    files = FeatureSet(name, tmp_path)
    assert files.record == record
    assert files.old_model == name.rpartition("_")[0]
    assert files.feature == tmp_path / scenario / f"{name}_feature.npy"
    assert files.label == tmp_path / scenario / f"{name}_label.npy"
    assert files.avg_feature == tmp_path / scenario / f"{name}_avg_feature.npy"
    assert files.credible(0.9) == tmp_path / scenario / f"{name}_credible_ratio_90_feature.npy"
    assert files.credible(0.55).name == f"{name}_credible_ratio_55_feature.npy"
    assert files.credible(1.0).name == f"{name}_credible_ratio_100_feature.npy"


@pytest.mark.parametrize("name", ["f128_r18_softmax", "class70", "_class70", "f128_class71", "../f128_class70", ""])
def test_invalid_names_are_refused(name):
    with pytest.raises(FeatureError, match="class70"):
        FeatureSet(name)


def test_the_command_that_writes_a_file():
    files = FeatureSet("f128_r18_softmax_class70")
    get = "python tools/get_feature/get_feature.py configs/f128_r18_softmax_class30.py --SD f128_r18_softmax_class70"
    assert command_for(files.feature) == command_for(files.label) == get
    assert command_for(files.avg_feature) == "python tools/get_feature/get_avg_feature.py --SD f128_r18_softmax_class70"
    assert command_for(files.root / "OPclass/f128_r18_softmax_class70_credible_entropy_feature.npy") == (
        "python tools/get_feature/credible_entropy.py --SD f128_r18_softmax_class70"
    )
    assert command_for(files.credible(0.9)) == (
        "python tools/get_feature/denoise_credible.py --T 0.9 --SD f128_r18_softmax_class70"
    )
    assert "configs/f512_r18_arc_data30.py" in command_for(FeatureSet("f512_r18_arc_data100").feature)
    assert command_for("/elsewhere/OPclass/some_old_class70_feature.npy") == (
        "python tools/get_feature/get_feature.py CONFIG --SD some_old_class70 --feature_save /elsewhere"
    )
    assert command_for("/else where/OPclass/some_old_class70_feature.npy").endswith(" --feature_save '/else where'")
    assert command_for("old.npy") == "python tools/get_feature/get_feature.py CONFIG --SD NAME"


def test_the_command_finds_the_old_model_of_a_workspace():
    demo = FeatureSet("f128_tiny_softmax_class70", "/work space/feature_save")
    assert command_for(demo.feature) == (
        "python tools/get_feature/get_feature.py configs/demo/f128_tiny_softmax_class30.py "
        "--SD f128_tiny_softmax_class70 --workspace '/work space'"
    )
    # A tool without a config has no workspace; it reads what is there already.
    assert command_for(demo.avg_feature) == (
        "python tools/get_feature/get_avg_feature.py --SD f128_tiny_softmax_class70 "
        "--feature_save '/work space/feature_save'"
    )


def test_the_command_omits_the_default_directory(monkeypatch, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "feature_save").symlink_to(tmp_path / "disk")
    monkeypatch.setattr(feature_set, "REPO", tmp_path)
    assert command_for(tmp_path / "feature_save/OPclass/a_class70_feature.npy").endswith("CONFIG --SD a_class70")
    monkeypatch.chdir(tmp_path)
    assert command_for("feature_save/OPclass/a_class70_feature.npy").endswith("CONFIG --SD a_class70")


# --- Age ---------------------------------------------------------------------------------------------------------


# --- Opening and saving ------------------------------------------------------------------------------------------


def test_loading_runs_no_code(tmp_path):
    np.save(tmp_path / "a_feature.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(FeatureError, match="not a readable .npy file"):
        open_array(tmp_path / "a_feature.npy", 2, np.floating)


def test_a_file_of_another_kind(tmp_path):
    files = FeatureSet("f128_r18_softmax_class70", tmp_path)
    files.feature.parent.mkdir()
    np.save(files.feature, np.zeros((11, 6), np.int64))
    np.save(files.label, np.arange(11) % 4)
    with pytest.raises(FeatureError, match="int64"):
        open_feature_set(files)
    np.save(files.feature, np.zeros((4, 6), np.float32))
    with pytest.raises(FeatureError, match="4 rows, but .*_label.npy has 11"):
        open_feature_set(files)


def test_save_array_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    save_array(path, np.arange(3))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(feature_set.os, "fsync", full)
        with pytest.raises(FeatureError, match="a.npy.*No space left"):
            save_array(path, np.arange(5))
    np.testing.assert_array_equal(np.load(path), np.arange(3))
    assert list(tmp_path.iterdir()) == [path]
