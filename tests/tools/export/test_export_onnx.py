"""A graph gives torch's embeddings at any batch size, says what it is, and is there whole or not at all."""

import json

import cv2
import numpy as np
import onnxruntime
import pytest
import torch

import backbones
from core.files import atomic_write
from core.manifest import digest, read_manifest, write_manifest
from dataset import to_input
from tests.conftest import draw_image, draw_record_set
from tools.export import export_onnx
from tools.export.export_onnx import ExportError, export, main, read_crops


def trained(path, network="tiny", width=24, seed=0, **facts):
    """A checkpoint of a network with statistics of its own, as after training, and its manifest."""
    torch.manual_seed(seed)
    model = backbones.get_model(network, width)
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(model.state_dict(), file)
        write_manifest(path, file, "backbone", **{"network": network, "width": width, **facts})
    return model.eval()


def run(path, images):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
        ["embeddings"], {"images": images.numpy()}
    )[0]


def crops(count=5):
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([draw_image(rng)[:, :, ::-1] for _ in range(count)]))


@pytest.mark.parametrize("network", ["tiny", "mbf", "vit_t"])
def test_the_graph_gives_torchs_embeddings_at_any_batch_size(network, tmp_path):
    model, out = trained(tmp_path / "model.pt", network), tmp_path / "new" / "model.onnx"
    said = export(tmp_path / "model.pt", out, network, crops=crops())
    assert f"{out}: {network}, 24 wide, embeddings as the network gives them\n" in said and "on 5 crops" in said
    for count in (1, 3):
        images = to_input(crops(count))
        with torch.no_grad():
            np.testing.assert_allclose(run(out, images), model(images).numpy(), rtol=1e-3, atol=1e-4)


def test_normalised_in_the_graph(tmp_path):
    model = trained(tmp_path / "model.pt")
    export(tmp_path / "model.pt", tmp_path / "raw.onnx", crops=crops())
    export(tmp_path / "model.pt", tmp_path / "one.onnx", normalise=True, crops=crops())
    images = to_input(crops())
    raw, one = run(tmp_path / "raw.onnx", images), run(tmp_path / "one.onnx", images)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.abs(lengths - 1).min() > 0.1
    np.testing.assert_allclose(one, raw / lengths, atol=1e-5)
    assert read_manifest(tmp_path / "one.onnx")["embeddings"] == "length 1"
    np.testing.assert_allclose(model(images).detach().numpy(), raw, atol=1e-4)


def test_the_manifest_goes_along_in_the_graph_and_beside_it(tmp_path):
    carried = {"method": "MixBCT", "step": 7, "finished": True, "records": "ab", "old_model": "cd"}
    trained(tmp_path / "model.pt", **carried)
    export(tmp_path / "model.pt", tmp_path / "m.onnx", crops=crops())
    beside = read_manifest(tmp_path / "m.onnx")
    expected = {**carried, "network": "tiny", "width": 24, "model": digest(tmp_path / "model.pt")}
    assert {key: beside[key] for key in expected} == expected and beside["what"] == "onnx"
    inside = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).get_modelmeta().custom_metadata_map
    assert {key: str(value) for key, value in expected.items()}.items() <= inside.items()
    assert inside["preprocessing"] == beside["preprocessing"] == export_onnx.PREPROCESSING


def test_a_graph_of_other_embeddings_is_not_published(tmp_path, monkeypatch):
    trained(tmp_path / "model.pt")
    other = trained(tmp_path / "other.pt", seed=1)
    honest = export_onnx.traced
    for network in (other, torch.nn.Sequential(other, Nothing())):
        monkeypatch.setattr(export_onnx, "traced", lambda _, facts, network=network: honest(network.eval(), facts))
        with pytest.raises(ExportError, match="give other embeddings"):
            export(tmp_path / "model.pt", tmp_path / "m.onnx", crops=crops())
    assert not list(tmp_path.glob("*.onnx*"))


class Nothing(torch.nn.Module):
    def forward(self, x):
        return x * float("nan")


def test_crops_of_a_record_set_and_of_a_folder(tmp_path):
    draw_record_set(tmp_path / "train.rec", [0, 1] * 30)
    assert read_crops(tmp_path).shape == read_crops(tmp_path / "train").shape == (32, 112, 112, 3)
    (tmp_path / "gallery/p").mkdir(parents=True)
    image = draw_image(np.random.default_rng(0))
    cv2.imwrite(str(tmp_path / "gallery/p/1.png"), image)
    cv2.imwrite(str(tmp_path / "gallery/p/2.png"), image[:90])
    np.testing.assert_array_equal(read_crops(tmp_path / "gallery")[0].numpy(), image[:, :, ::-1])
    assert len(read_crops(tmp_path / "gallery")) == 1
    with pytest.raises(ExportError, match="no .jpg or .png of 112 x 112"):
        (tmp_path / "none").mkdir()
        read_crops(tmp_path / "none")


@pytest.mark.parametrize(
    "words, reason",
    [
        ("{0}/none.pt -net tiny {0}/m.onnx", "none.pt: no such model file"),
        ("{0}/model.pt -net tiny_x2 {0}/m.onnx", "not a tiny_x2"),
        ("{0}/model.pt -net nothing {0}/m.onnx", "unknown network"),
        ("{0}/model.pt {0}/m.onnx --crops {0}/none", "none: no .jpg or .png"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, capsys, words, reason):
    trained(tmp_path / "model.pt")
    with pytest.raises(SystemExit):
        main(words.format(tmp_path).split())
    assert reason in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.glob("*.onnx*"))


def test_the_manifest_of_another_network_is_refused(tmp_path):
    trained(tmp_path / "model.pt")
    beside = tmp_path / "model.pt.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"network": "r50"}))
    with pytest.raises(ExportError, match="its manifest says -net r50, not tiny"):
        export(tmp_path / "model.pt", tmp_path / "m.onnx", "tiny", crops=crops())


def test_the_script_exports_on_noise_where_there_are_no_crops(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_onnx, "REPO", tmp_path)
    trained(tmp_path / "model.pt")
    main([str(tmp_path / "model.pt"), "-net", "tiny", str(tmp_path / "m.onnx")])
    assert "on noise, for want of crops (--crops): largest relative difference" in capsys.readouterr().out
