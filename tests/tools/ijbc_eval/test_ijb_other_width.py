"""Cross-tests of models of two widths by hand: the query is cut or padded, the gallery never; self-tests are whole."""

import json

import numpy as np
import pytest

from tests.losses.test_old_width import by_hand
from tools.ijbc_eval import compat_report, ijbc_eval
from tools.ijbc_eval.metrics import FPIRS, TOP
from tools.ijbc_eval.templates import as_query, l2_normalise

WIDTHS = {"narrow": 8, "wide": 24}  # the old model has 16
FPR, FPIR = 0.1, 0.3


@pytest.fixture(scope="module")
def models(tmp_path_factory, plain_class, shared_set):
    """name -> (model file, template features by loops)."""
    from tests.tools.ijbc_eval.conftest import make_model

    folder = tmp_path_factory.mktemp("widths")
    files = {
        name: make_model(folder / name / "model.pt", width, seed=7) for name, width in {"old": 16, **WIDTHS}.items()
    }
    return {name: (file, plain_class(shared_set, file).templates()) for name, file in files.items()}


def queries(templates, width=16):
    return {template: by_hand([row], width)[0] for template, row in templates.items()}


def options(shared_set, shared_cache):
    return ["-d", str(shared_set.data_dir), "--workers", "0", "--cache-dir", str(shared_cache)]


@pytest.mark.parametrize("name", WIDTHS)
def test_ijbc_eval(name, models, plain_class, shared_set, shared_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (old_file, old), (file, own) = models["old"], models[name]
    command = ["-m", str(file), "-m_old", str(old_file), *options(shared_set, shared_cache)]
    for test in ([], ["-N"]):
        ijbc_eval.main([*command, *test, "-R", f"r{len(test)}.npz"])
    said = "by the first 16 coordinates" if name == "wide" else "padded with zeros"
    assert f"{WIDTHS[name]}-dimensional" in (told := capsys.readouterr().err) and said in told
    query = queries(own)
    with np.load("r0.npz") as result:
        np.testing.assert_allclose(result["scores"][0], plain_class.pair_scores(shared_set, old, query), atol=2e-6)
        assert result["widths"].tolist() == [16, WIDTHS[name]]
    with np.load("r1.npz") as result:
        for row, gallery in enumerate(shared_set.galleries.values()):
            tops, tpirs = plain_class.search(gallery, shared_set.probes, old, query, TOP, FPIRS)
            assert result["top_rates"][0, row] == pytest.approx(tops)
            assert result["tpirs"][0, row] == pytest.approx(tpirs)


def test_compat_report(models, plain_class, shared_set, shared_cache, tmp_path):
    (old_file, old), *_ = models.values()
    command = ["--old", str(old_file), *options(shared_set, shared_cache), "--out", str(tmp_path), "--bootstrap", "0"]
    command += [word for name in WIDTHS for word in ("--new", f"{name}={models[name][0]}")]
    command += ["--independent", f"free={models['wide'][0]}", "--fpr", str(FPR), "--fpir", str(FPIR)]
    compat_report.main(command)
    report = json.loads((tmp_path / "report.json").read_text())

    def tpir(gallery_features, probe_features):
        found = [
            plain_class.search(gallery, shared_set.probes, gallery_features, probe_features, TOP, [FPIR])[1][0]
            for gallery in shared_set.galleries.values()
        ]
        return pytest.approx(np.mean(found))

    text = (tmp_path / "report.md").read_text()
    assert report["old"]["width"] == 16 and report["independent"]["cross"] == report["new"][1]["cross"]
    for part in report["new"]:
        own = models[part["name"]][1]
        cross, whole = tpir(old, queries(own)), tpir(own, own)
        assert (part["cross"]["tpir"], part["self"]["tpir"]) == (cross, whole)
        assert part["width"] == WIDTHS[part["name"]]
        (plain,) = (curve for curve in part["refresh"] if (curve["order"], curve["way"]) == ("random", "plain"))
        assert (plain["tpir"][0], plain["tpir"][-1]) == (cross, whole)
        assert f"{part['name']} has features of {WIDTHS[part['name']]} dimensions" in text


def test_at_equal_width_features_are_taken_as_they_are():
    features = l2_normalise(np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32))
    assert as_query(features, 16) is features
