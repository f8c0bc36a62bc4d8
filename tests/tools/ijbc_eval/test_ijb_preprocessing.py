"""--mean, --std and --bgr of one model or of all: what it gets, its own cache entry, what the results say of it."""

import json

import cv2
import numpy as np
import pytest
import torch

from backbones import load_backbone
from backbones.model_files import ModelFile, Preprocessing, load_model
from tools.ijbc_eval import compat_report, ijbc_eval


@pytest.mark.parametrize("bgr", [False, True])
def test_what_a_model_gets(bgr, shared_models):
    images = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3)).astype(np.uint8)
    file = ModelFile(str(shared_models["old_model"]), "tiny", Preprocessing(100.0, 50.0, bgr))
    fed = [cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if bgr else image for image in images]
    fed = (torch.from_numpy(np.stack(fed)).float() - 100) / 50
    with torch.no_grad():
        expected = load_backbone(file.file, "tiny")(fed.permute(0, 3, 1, 2))
    np.testing.assert_allclose(load_model(file, "cpu")(images), expected, atol=1e-5)


def scores(command, path):
    ijbc_eval.main([*command, "-R", str(path)])
    with np.load(path) as result:
        return result["scores"][0], result["preprocessing"].tolist()


def test_ijbc_eval_of_one_side_and_of_both(shared_set, shared_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new, old = (str(shared_models[name]) for name in ("new_model", "old_model"))
    common = ["-d", str(shared_set.data_dir), "--workers", "0", "--cache-dir", str(tmp_path / "cache")]
    cross = ["-m", new, "-m_old", old, *common]
    plain, said = scores(cross, tmp_path / "a.npz")
    assert said == ["RGB (x - 127.5) / 128"] * 2
    of_old, said = scores([*cross, "--bgr", "old", "--std", "old=50"], tmp_path / "b.npz")
    assert said == ["BGR (x - 127.5) / 50", "RGB (x - 127.5) / 128"]
    of_both, said = scores([*cross, "--std", "50", "--bgr"], tmp_path / "c.npz")
    assert said == ["BGR (x - 127.5) / 50"] * 2
    for other in (of_old, of_both):
        assert np.abs(plain - other).max() > 1e-4
    assert np.abs(of_old - of_both).max() > 1e-4
    again, _ = scores(cross, tmp_path / "d.npz")  # from the cache, where each has its own entry
    assert np.array_equal(again, plain) and len(list((tmp_path / "cache/embeddings").glob("*.npy"))) == 4


def test_the_report_by_the_models_names(shared_set, shared_models, tmp_path):
    new, old = (str(shared_models[name]) for name in ("new_model", "old_model"))
    command = ["--old", old, "--new", f"a={new}", "--new", f"b={new}", "-d", str(shared_set.data_dir)]
    command += ["--workers", "0", "--cache-dir", str(tmp_path / "cache"), "--fpr", "0.1", "--fpir", "0.3"]
    compat_report.main([*command, "--bootstrap", "0", "--bgr", "b", "--mean", "b=0", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["data"]["preprocessing"]["b"] == "BGR (x - 0) / 128"
    assert report["data"]["preprocessing"]["a"] == "RGB (x - 127.5) / 128"
    said = (tmp_path / "report.md").read_text()
    assert f"Input: RGB (x - 127.5) / 128 of pixels x ({report['old']['name']}, a); BGR (x - 0) / 128" in said
    first, second = (part["self"]["auc"] for part in report["new"])
    assert first != second


@pytest.mark.parametrize(
    "options, message",
    [(["--bgr", "other"], "no model is named 'other'; NAME is one of new"), (["--std", "0"], "--std: must be above 0")],
)
def test_names_and_values_that_are_none(options, message, shared_set, shared_models, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        ijbc_eval.main(["-m", str(shared_models["new_model"]), "-d", str(shared_set.data_dir), *options])
    with pytest.raises(SystemExit):
        ijbc_eval.parse_arguments(["-m", "a.pt", "--std", "old=x"])
