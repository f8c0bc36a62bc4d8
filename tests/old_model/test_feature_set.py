"""Feature files: names, the commands that write them, and their age against the old model's."""

import errno
import json
import os

import numpy as np
import pytest

from core.manifest import manifest_path
from old_model import feature_set
from old_model.feature_set import (
    UNKNOWN,
    FeatureError,
    FeatureSet,
    command_for,
    open_array,
    open_feature_set,
    save_array,
)


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


@pytest.mark.parametrize("name", ["f128_r18_softmax", "class70", "_class70", "f128_class71", "prod v1"])
def test_any_other_name_is_one_of_ones_own_set(name, tmp_path):
    files = FeatureSet(name, tmp_path)
    assert (files.old_model, files.set, files.record, files.scenario) == (name, None, None, "own")
    assert files.feature == tmp_path / "own" / f"{name}_feature.npy"
    assert f"--SD {name} --rec REC" in command_for(files.feature)
    assert command_for(tmp_path / "elsewhere" / f"{name}_feature.npy").endswith("--SD NAME")


@pytest.mark.parametrize("name", ["../f128_class70", ""])
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
        f"python tools/get_feature/get_feature.py {UNKNOWN} --SD some_old_class70 --feature_save /elsewhere"
    )
    assert command_for("/else where/OPclass/some_old_class70_feature.npy").endswith(" --feature_save '/else where'")
    assert command_for("old.npy") == f"python tools/get_feature/get_feature.py {UNKNOWN} --SD NAME"


def test_the_command_of_features_that_no_config_made_is_in_their_manifest(tmp_path):
    files = FeatureSet("production_class100", tmp_path)
    files.feature.parent.mkdir()
    made_by = "get_feature.py --model old.onnx --SD production_class100"
    for command in (f"get_feature.py --local-rank=0{made_by[14:]}", "other.py -f", 7):
        manifest_path(files.feature).write_text(json.dumps({"command": command}))
        said = made_by if "local-rank" in str(command) else "get_feature.py ("
        assert command_for(files.label).startswith(f"python tools/get_feature/{said}")
    assert command_for(files.credible(0.9)).startswith("python tools/get_feature/denoise_credible.py --T 0.9 --SD prod")


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
    assert command_for(tmp_path / "feature_save/OPclass/a_class70_feature.npy").endswith(f"{UNKNOWN} --SD a_class70")
    monkeypatch.chdir(tmp_path)
    assert command_for("feature_save/OPclass/a_class70_feature.npy").endswith(f"{UNKNOWN} --SD a_class70")


# --- Opening and saving ------------------------------------------------------------------------------------------


def test_loading_runs_no_code(tmp_path):
    np.save(tmp_path / "a_feature.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(FeatureError, match="not a readable .npy file"):
        open_array(tmp_path / "a_feature.npy", 2, np.floating)


def npy(shape, descr="'<f4'"):
    """A .npy file whose header says so."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (63 - (len(header) + 10) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)


def test_a_damaged_header_is_named_whatever_it_says(tmp_path):
    path = tmp_path / "a_feature.npy"
    path.write_bytes(npy("(4, 2)"))
    assert open_array(path, 2, np.floating).shape == (4, 2)
    shapes = ["(4000000000000, 128)", "(-3, 2)", f"({10**20}, 2)", "(True, 2)", "(1.5, 2)", "(3, 2", "(" * 300, "()"]
    np.savez(tmp_path / "archive.npz", a=np.ones(3))
    whole = npy("(4, 2)")
    contents = [npy(shape) for shape in shapes] + [npy("(4, 2)", "'<f99'"), npy("(4, 2)", "[('a', '<f4')]")]
    contents += [(tmp_path / "archive.npz").read_bytes(), b"", whole[:9], whole[:40], b"\x93NUMPY\x09" + whole[7:]]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(FeatureError, match="a_feature.npy: .*rewrite it"):
            open_array(path, 2, np.floating)


def test_a_path_that_the_system_refuses_is_not_called_damaged(tmp_path):
    with pytest.raises(FeatureError, match="cannot be read .Is a directory.; check the path and the disk"):
        open_array(tmp_path, 2, np.floating)


@pytest.mark.parametrize(
    "number, step", [(errno.ENOSPC, "free some space"), (errno.EROFS, "check the path, its permi")]
)
def test_what_to_do_about_a_file_that_cannot_be_written(tmp_path, monkeypatch, number, step):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(feature_set, "atomic_write", refuse)
    with pytest.raises(FeatureError, match=f"a.npy: cannot be written .{os.strerror(number)}.; .*{step}"):
        save_array(tmp_path / "a.npy", np.arange(3))


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
