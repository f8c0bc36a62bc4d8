"""Every file made from the old model x every reader: one that belongs to something else is refused or made again.

Writers and readers are found in the code: all tools of tools/get_feature/ and all methods, by their demo configs. Two
old models of one shape, and two record sets of the same classes, give files that only their manifests tell apart.
"""

import importlib
import pathlib
import shutil

import numpy as np
import pytest
import torch

import backbones
from core.config import PATH_KEYS, load_config
from core.errors import UserError
from core.files import atomic_write
from core.manifest import ManifestError, manifest_path, read_manifest, write_manifest
from dataset import open_train_set
from engine import checkpoint
from tests.conftest import draw_record_set

REPO = pathlib.Path(__file__).resolve().parents[1]
TOOLS = sorted(path.stem for path in (REPO / "tools/get_feature").glob("*.py") if "def main(" in path.read_text())
CONFIGS = {path.stem.split("_")[-5]: path for path in sorted(REPO.glob("BCT_methods/*/configs/demo/*.py"))}
OLD, SD = "f128_tiny_softmax_class30", "f128_tiny_softmax_class70"
LABELS = np.arange(36) % 4


def train_old_model(workspace, seed):
    torch.manual_seed(seed)
    path = workspace / "work_dirs" / OLD / "model.pt"
    path.parent.mkdir(parents=True)
    with atomic_write(path) as file:
        torch.save(backbones.get_model("tiny", num_features=128).state_dict(), file)
        write_manifest(path, file, "backbone", network="tiny", width=128, finished=True)
    return path


def make_files(workspace):
    """Run every tool on the workspace's record set and old model."""
    for tool in TOOLS:
        config = f"configs/demo/{OLD}.py"
        words = [config, "--SD", SD, "--workspace", str(workspace), "--num_workers", "0", "--batch_size", "36"]
        importlib.import_module(f"tools.get_feature.{tool}").main(words)


def start(method, workspace, *words):
    """The method's Trainer with its demo config, up to its first step."""
    config = CONFIGS[method]
    kind = config.relative_to(REPO).parts[1]
    words = ["--workspace", str(workspace), "--num_workers", "0", "--batch_size", "4", "--network", "tiny", *words]
    cfg = load_config(config, [*words, *(["--queue_size", "8"] if kind == "NCCL" else [])])
    return getattr(importlib.import_module(f"BCT_methods.{kind}.train"), kind)(cfg)


def old_files(cfg):
    """The config's paths that are files in feature_save, by key."""
    found = {key: pathlib.Path(cfg[key]) for key in PATH_KEYS if cfg.get(key)}
    return {key: path for key, path in found.items() if "feature_save" in path.parts and path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Workspaces `mine`; `retrained`, its old model another one; `redrawn`, with other people in the same classes."""
    folders = {}
    for name, model, images in (("mine", 1, 1), ("retrained", 2, 1), ("redrawn", 1, 2)):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        rec = folder / "dataset/ms1m-retinaface-t1/train_part_70_class.rec"
        rec.parent.mkdir(parents=True)
        draw_record_set(rec, LABELS.tolist(), seed=images)
        train_old_model(folder, model)
        make_files(folder)
        start("AdvBCT", folder)  # writes its boundaries
    return folders


@pytest.fixture
def mine(made, tmp_path):
    """A copy of the workspace, to be spoilt."""
    return pathlib.Path(shutil.copytree(made["mine"], tmp_path / "mine"))


def test_every_made_file_has_a_manifest(made):
    for folder in made.values():
        files = [path for path in folder.rglob("*") if path.suffix in (".npy", ".npz", ".pt")]
        assert len(files) >= 7 and [path for path in files if not manifest_path(path).is_file()] == []
        for path in files:
            assert read_manifest(path)["what"]


@pytest.mark.parametrize("method", CONFIGS)
def test_files_that_belong_together_are_accepted(method, made, capsys):
    run = start(method, made["mine"])
    assert {"records", "old_model"} < set(run.made_from) and "not checked" not in capsys.readouterr().out
    run.save_backbone("model.pt")
    said = read_manifest(pathlib.Path(run.cfg.output) / "model.pt")
    assert (said["old_model"], said["records"]) == (run.made_from["old_model"], open_train_set(run.cfg.rec).digest())


@pytest.mark.parametrize("other", ["retrained", "redrawn"])
@pytest.mark.parametrize("method", CONFIGS)
def test_another_file_under_the_same_name_is_refused(method, other, made, mine):
    """By `cp -p`, alone and with its manifest; labels, the same in both record sets, only with it."""
    keys = old_files(start(method, mine).cfg)
    assert keys
    for path in keys.values():
        theirs = made[other] / path.relative_to(mine)
        same = path.read_bytes() == theirs.read_bytes()
        for suffixes in ([""], ["", ".json"]):
            if same and (suffixes == [""] or manifest_path(path).read_bytes() == manifest_path(theirs).read_bytes()):
                continue
            kept = {suffix: pathlib.Path(f"{path}{suffix}").read_bytes() for suffix in ("", ".json")}
            for suffix in suffixes:
                shutil.copy2(f"{theirs}{suffix}", f"{path}{suffix}")
            with pytest.raises(ManifestError, match=rf"{path}: (has changed|made from another).*(write|delete)"):
                start(method, mine)
            for suffix, content in kept.items():
                pathlib.Path(f"{path}{suffix}").write_bytes(content)
        start(method, mine)


@pytest.mark.parametrize("method", CONFIGS)
def test_other_people_and_another_old_model_are_refused(method, made, mine):
    start(method, mine)
    for other, place in (("retrained", f"work_dirs/{OLD}"), ("redrawn", "dataset/ms1m-retinaface-t1")):
        shutil.copytree(mine / place, mine / "before")
        shutil.copytree(made[other] / place, mine / place, dirs_exist_ok=True)
        with pytest.raises(ManifestError, match="made from another (model|record set) than .*; rewrite it"):
            start(method, mine)
        shutil.rmtree(mine / place)
        (mine / "before").rename(mine / place)
    start(method, mine)


def test_a_run_on_another_set_than_the_features_is_told_both_ways_out(mine):
    draw_record_set(mine / "dataset/ms1m-retinaface-t1/train.rec", LABELS.tolist(), seed=3)
    step = "set rec to that, or take .*EXclass/f128_tiny_softmax_class100_feature.npy"
    with pytest.raises(ManifestError, match=f"train.rec; by its name it is of train_part_70_class.rec: {step}"):
        start("L2", mine, "--rec", "dataset/ms1m-retinaface-t1/train.rec")


def test_boundaries_of_other_features_are_made_again(made, mine):
    (path,) = mine.rglob("*_center_radius.npz")
    right = path.read_bytes()
    for other in ("retrained", "redrawn"):
        for suffixes in ([""], ["", ".json"]):
            for suffix in suffixes:
                shutil.copy2(f"{made[other] / path.relative_to(mine)}{suffix}", f"{path}{suffix}")
            assert path.read_bytes() != right
            start("AdvBCT", mine)
            assert path.read_bytes() == right


def test_features_without_a_manifest_are_used_with_a_warning(mine, capsys):
    for path in mine.rglob("*.json"):
        path.unlink()
    start("MixBCT", mine)
    start("MixBCT", mine)
    said = [line for line in capsys.readouterr().out.splitlines() if "what it was made from is not checked" in line]
    assert len(said) == 3


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_refuse_features_and_labels_of_two_sets(tool, made, mine, capsys):
    path = next(mine.rglob("*_label.npy"))
    for suffix in ("", ".json"):
        shutil.copy2(f"{made['redrawn'] / path.relative_to(mine)}{suffix}", f"{path}{suffix}")
    if tool == "get_feature":
        make_files(mine)
        said = capsys.readouterr().out
        assert f"extracting: {path}: made from another record set than" in said and "wrote" in said
        return
    with pytest.raises(SystemExit):
        words = ["--SD", SD, "--feature_save", str(mine / "feature_save")]
        importlib.import_module(f"tools.get_feature.{tool}").main(words)
    assert "made from another record set than" in capsys.readouterr().err


@pytest.mark.parametrize(
    "other, place, reason",
    [
        ("retrained", f"work_dirs/{OLD}/model.pt", "made from another model than"),
        ("redrawn", "dataset/ms1m-retinaface-t1/train_part_70_class.rec", "made from another record set than"),
        ("retrained", f"feature_save/OPclass/{SD}_feature.npy", "has changed since"),
        ("retrained", f"feature_save/OPclass/{SD}_feature.npy.json", "has changed since"),
    ],
)
def test_get_feature_says_why_it_extracts_again(other, place, reason, made, mine, capsys):
    """The file comes by `cp -p`: a model with its manifest, a record file with its index, features without."""
    make_files(mine)
    assert "kept, it is of" in capsys.readouterr().out
    beside = {"model.pt": ["model.pt.json"], "train_part_70_class.rec": ["train_part_70_class.idx"]}
    source = made[other] / place
    for name in (source.name, *beside.get(source.name, [])):
        shutil.copy2(source.with_name(name), (mine / place).with_name(name))
    make_files(mine)
    assert reason in capsys.readouterr().out
    make_files(mine)
    assert "kept, it is of" in capsys.readouterr().out


def test_get_feature_refuses_another_network_or_width(mine, capsys):
    from tools.get_feature.get_feature import main

    for key, value in (("network", "tiny_x2"), ("embedding_size", "64")):
        with pytest.raises(SystemExit):
            main([f"configs/demo/{OLD}.py", "--SD", SD, "--workspace", str(mine), f"--{key}", value])
        assert f"trained with {key} = " in capsys.readouterr().err


def test_a_run_is_not_resumed_on_other_people_or_another_old_model(made, mine):
    def saved(folder):
        run = start("BCT", folder)
        run.claimed = checkpoint.claim(run.cfg.output)
        return run

    run = saved(mine)
    run.monitor = type("Quiet", (), {"flush": lambda self: None})()
    run.save_checkpoint()
    run.claimed.close()
    for other, text in (("redrawn", "another rec than"), ("retrained", "another old_model_path than")):
        folder = made[other]
        shutil.copytree(run.cfg.output, folder / "work_dirs" / pathlib.Path(run.cfg.output).name, dirs_exist_ok=True)
        again = saved(folder)
        with pytest.raises(UserError, match=f"written with {text}.*; put that one back to resume"):
            again.resume()
        again.claimed.close()
    run = saved(mine)
    run.resume()
    run.claimed.close()
