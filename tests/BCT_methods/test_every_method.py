"""What all methods have in common: when old features are read, and which values are refused."""

import importlib

import numpy as np
import pytest

from core.config import ConfigError, load_config
from core.errors import UserError
from core.errors import _line as one_line
from old_model.feature_set import FeatureError
from tests.BCT_methods.whole_runs import METHODS, REPO, WIDTH, launch, without_batch_norm, write_old_features

LABELS = np.arange(12) % 3


@pytest.fixture
def folder(tmp_path):
    """Old features of a synthetic training set, old_avg_feature.npy and credible.npy."""
    write_old_features(tmp_path, LABELS)
    np.save(tmp_path / "credible.npy", np.ones(12, bool))
    return tmp_path


def start(method, folder, **keys):
    """The method's Trainer, set up on the synthetic set; of the usual keys it gets those that it knows."""
    kind = getattr(importlib.import_module(f"BCT_methods.{method}.train"), method)
    plain = type("Plain", (kind,), {"build_backbone": lambda self: without_batch_norm()})
    cfg = load_config(REPO / "BCT_methods" / method / "configs" / "base.py", [f"--{k}={v}" for k, v in keys.items()])
    usual = {
        "rec": "synthetic",
        "rec_val": "",
        "num_classes": 3,
        "num_image": 12,
        "batch_size": 4,
        "num_workers": 0,
        "embedding_size": WIDTH,
        "output": str(folder / "out"),
        "queue_size": keys.get("queue_size", 8),
        "old_embedding": str(folder / "old_feature.npy"),
        "old_embedding_label": str(folder / "old_label.npy"),
        "old_prototype": str(folder / "old_avg_feature.npy"),
        "credible_old_feature": str(folder / "credible.npy"),
    }
    cfg.update({key: cfg[key] if key in keys else value for key, value in usual.items() if key in cfg})
    return plain(cfg)


@pytest.mark.parametrize("method", METHODS)
def test_batches_carry_what_the_method_states(method, folder):
    run = start(method, folder)
    run.loader.set_epoch(0)
    batch = next(iter(run.loader))
    sum(run.losses(batch).values()).backward()
    assert (batch.old is not None) == (batch.credible is not None) == (run.old_features == "rows")
    if run.old_features == "rows":
        assert np.array_equal(batch.old, np.load(folder / "old_feature.npy")[batch.index])


@pytest.mark.parametrize("method", METHODS)
def test_labels_of_another_record_file_end_the_run_of_every_method_with_old_features(method, folder, monkeypatch):
    run = start(method, folder)
    if run.old_features is None:
        assert "old_embedding" not in run.cfg
        return
    monkeypatch.setattr(type(run.train_set), "fill", lambda self, rows, images: (np.asarray(rows) + 1) % 3)
    with pytest.raises(FeatureError, match="old_feature.npy: row .* is of class .*another record file"):
        next(iter(run.loader))


def test_a_method_whose_base_config_declares_no_old_features_is_told_what_to_write(folder):
    kind = type("New", (importlib.import_module("BCT_methods.BCT.train").BCT,), {"old_features": "rows"})
    with pytest.raises(ConfigError, match="New uses old features, but.*declares no old_embedding; start it with"):
        kind(
            load_config(
                REPO / "BCT_methods/BCT/configs/base.py",
                [f"--output={folder / 'out'}", "--rec=synthetic", "--num_classes=3", "--num_image=150"],
            )
        )


@pytest.mark.parametrize(
    "method, key, value, text",
    [
        ("AdvBCT", "threshold", 0.0, "above 0 and at most 2"),
        ("AdvBCT", "threshold", 2.1, "above 0 and at most 2"),
        ("AdvBCT", "p2s_weight", -1.0, "at least 0"),
        ("AdvBCT", "adv_weight", -0.5, "at least 0"),
        ("BCT", "scale", 0.0, "above 0"),
        ("L2", "threshold", -0.1, "in .0, 2."),
        ("LCE", "align_weight", -1.0, "at least 0"),
        ("LCE", "boundary_weight", -1.0, "at least 0"),
        ("MixBCT", "mix_ratio", -0.1, "in .0, 1."),
        ("MixBCT", "mix_ratio", 1.1, "in .0, 1."),
        ("NCCL", "queue_size", 0, "at least 1"),
        ("NCCL", "temperature", 0.0, "above 0"),
        ("NCCL", "alpha", -1.0, "at least 0"),
        ("NCCL", "beta", -1.0, "at least 0"),
        ("RACT", "ract_weight", -1.0, "at least 0"),
        ("RACT", "temperature", 0.0, "above 0"),
        ("RACT", "negatives", 0, "at least 1"),
        ("UniBCT", "damping", 1.0, "at least 0 and below 1"),
        ("UniBCT", "temperature", -0.1, "above 0"),
        ("UniBCT", "scale", -1.0, "above 0"),
    ],
)
def test_values_out_of_range_are_named_with_file_and_key(method, key, value, text, folder):
    with pytest.raises(ConfigError, match=f"BCT_methods/{method}/configs/base.py: {key} = {value}; it must be {text}"):
        start(method, folder, **{key: value})


@pytest.mark.parametrize(
    "method, keys, line",
    [
        ("MixBCT", {"mix_ratio": 0.24}, "mix_ratio = 0.24 of batch_size = 4 is less than one image"),
        ("NCCL", {"queue_size": 3}, "queue_size = 3 is less than a step's 4 images"),
        ("L2", {"warmup_epoch": 35}, "warmup_epoch 35 is never reached with num_epoch = 35"),
        ("BCT", {"decay_epoch": "[20,35,36]"}, "decay_epoch 35, 36 is never reached with num_epoch = 35"),
        ("UniBCT", {"refine_epochs": "[34,40]"}, "refine_epochs 40 is never reached with num_epoch = 35"),
        ("UniBCT", {"compat_start_epoch": 35}, "compat_start_epoch 35 is never reached with num_epoch = 35"),
    ],
)
def test_a_value_that_comes_to_nothing_is_said_at_the_start(method, keys, line, folder, capsys):
    start(method, folder, **({"mix_ratio": 0.25} if method == "MixBCT" else {}))
    capsys.readouterr()
    start(method, folder)
    usual = capsys.readouterr().out
    start(method, folder, **keys)
    assert capsys.readouterr().out.count(line) == 1 and line.split(" ")[0] not in usual


@pytest.mark.parametrize(
    "method, key",
    [
        ("L2", "rec"),
        ("L2", "rec_val"),
        ("L2", "output"),
        ("L2", "old_embedding"),
        ("L2", "old_embedding_label"),
        ("MixBCT", "credible_old_feature"),
        ("BCT", "old_prototype"),
        ("AdvBCT", "center_radius"),
    ],
)
@pytest.mark.parametrize("kind", ["directory", "file", "below a file", "too long"])
def test_a_path_of_another_kind_is_one_line(method, key, kind, folder):
    (folder / "directory").mkdir()
    (folder / "file").write_bytes(b"")
    path = {"below a file": folder / "file/x/y", "too long": folder / ("x" * 300)}.get(kind, folder / kind)
    if (key, kind) == ("output", "directory"):
        return  # as it should be
    with pytest.raises((UserError, OSError)) as caught:
        start(method, folder, **{key: path, **({"val_targets": "lfw"} if key == "rec_val" else {})}).train()
    line = one_line(caught.value)
    assert line and path.name[:5] in line and "\n" not in line


# AdvBCT's and NCCL's launcher tests stand with their own tests, and look into what these runs leave behind.
@pytest.mark.parametrize("method", ["BCT", "L2", "LCE", "MixBCT", "RACT", "UniBCT"])
def test_train_script_on_two_ranks(method, folder, make_record_set):
    make_record_set(folder / "set.rec", LABELS.tolist())
    keys = {
        "rec": folder / "set.rec",
        "output": folder / "out",
        "embedding_size": WIDTH,
        "network": "tiny",
        "num_epoch": 3,
        "batch_size": 4,
        "num_workers": 0,
        "old_embedding": folder / "old_feature.npy",
        "old_embedding_label": folder / "old_label.npy",
        "old_prototype": folder / "old_avg_feature.npy",
        "credible_old_feature": folder / "credible.npy",
        "compat_start_epoch": 0,
        "refine_epochs": [1],
        "decay_epoch": [],
    }
    known = load_config(REPO / "BCT_methods" / method / "configs" / "base.py")
    overrides = [f"--{key}={value}" for key, value in keys.items() if key in known]
    name = next((REPO / "BCT_methods" / method / "configs").glob("OPclass*softmax_to_arc_f128.py")).name
    launch(method, f"configs/{name}", *overrides)
    log = (folder / "out/training.log").read_text()
    assert "2 ranks on" in log and "Global Step: 3 " in log
    files = {path.name for path in (folder / "out").iterdir()}
    assert {"model.pt", "softmax_fc_gpu_0.pt", "softmax_fc_gpu_1.pt"} <= files
    if method == "UniBCT":
        assert np.load(folder / "out/prototypes_epoch_1.npy").shape == (3, WIDTH)


@pytest.mark.parametrize("form", [*(method for method in METHODS if method != "MixBCT"), "weakenedL2"])
def test_nine_configs_have_mixbcts_data_and_old_features(form):
    configs = REPO / "BCT_methods"
    for path in sorted((configs / "MixBCT/configs").glob("*_MixBCT_*.py")):
        config = load_config(configs / form.removeprefix("weakened") / "configs" / path.name.replace("MixBCT", form))
        mixbct = load_config(path)
        for key in ("rec", "embedding_size", "old_embedding", "old_embedding_label"):
            assert config.get(key, mixbct[key]) == mixbct[key], (path.name, key)
        prototypes = config.get("old_prototype") or mixbct.old_embedding.replace("_feature.npy", "_avg_feature.npy")
        assert prototypes == mixbct.old_embedding.replace("_feature.npy", "_avg_feature.npy")
        assert config.output.endswith(path.stem.replace("MixBCT", form))
