"""Loading model files, and the errors on those that do not load."""

import pytest
import torch

import backbones
from backbones.vit import SIZES as VIT_SIZES


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = backbones.get_model("tiny", 24)
    for part in model.modules():
        if isinstance(part, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return model.eval()


def saved(state, tmp_path, name="model.pt"):
    path = tmp_path / name
    torch.save(state, path)
    return path


def test_loads_what_was_saved(tiny, tmp_path):
    path = saved(tiny.state_dict(), tmp_path)
    random_state = torch.get_rng_state()
    model = backbones.load_backbone(path, "tiny", "cpu", fp16=True)
    assert torch.equal(random_state, torch.get_rng_state())
    assert model.num_features == 24 and not model.training and model.fp16
    images = torch.randn(2, 3, 112, 112)
    with torch.inference_mode():
        assert torch.equal(model(images), tiny(images))


@pytest.mark.parametrize(
    "name, key", [("r18", "fc.weight"), ("mbf", "features.layers.2.weight"), ("vit_t", "feature.2.weight")]
)
def test_embedding_size_comes_from_the_file(name, key, tmp_path):
    model = backbones.get_model(name, 20)
    state = model.state_dict()
    assert backbones.embedding_size(state) == state[key].shape[0] == 20
    loaded = backbones.load_backbone(saved(state, tmp_path), name)
    assert loaded.num_features == 20
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in state.items())
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {key for key, parameter in loaded.named_parameters() if not parameter.requires_grad} == frozen


def test_embedding_size_of_something_else():
    with pytest.raises(ValueError, match="no embedding layer: none of fc.weight, features.lay"):
        backbones.embedding_size({"weight": torch.zeros(3, 3)})


def test_wrong_network_names_the_one_that_fits(tiny, tmp_path):
    path = saved(tiny.state_dict(), tmp_path)
    lacking = "model.pt: not a r18: missing conv1.weight, .*; unexpected layers.0.weight, .*; the file matches tiny$"
    with pytest.raises(ValueError, match=lacking):
        backbones.load_backbone(path, "r18")
    shapes = r"not a tiny_x2: wrong shape: layers.0.weight is \[16, 3, 5, 5\] instead of \[32, 3, 5, 5\]"
    with pytest.raises(ValueError, match=shapes):
        backbones.load_backbone(path, "tiny_x2")


def test_a_file_that_fits_nothing(tiny, tmp_path):
    state = tiny.state_dict()
    del state["layers.4.running_mean"]
    state["layers.0.bias"] = torch.zeros(16)
    path = saved(state, tmp_path)
    message = "missing layers.4.running_mean; unexpected layers.0.bias; it matches no other network"
    with pytest.raises(ValueError, match=message):
        backbones.load_backbone(path, "tiny")
    with pytest.raises(ValueError, match="model.pt: no embedding layer.*its keys weight, bias$"):
        backbones.load_backbone(saved({"weight": torch.zeros(2), "bias": torch.zeros(2)}, tmp_path), "tiny")


def test_unknown_network_comes_before_the_file(tmp_path):
    with pytest.raises(ValueError, match="unknown network 'tinny': did you mean tiny"):
        backbones.load_backbone(tmp_path / "absent.pt", "tinny")


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pt: no such model file"):
        backbones.load_backbone(tmp_path / "absent.pt", "tiny")


SAME_KEYS = {"vit_t_dp005_mask0": "vit_t", "vit_s_dp005_mask_0": "vit_s", "vit_b_dp005_mask_005": "vit_b"}


@pytest.mark.parametrize("name", backbones.names())
def test_the_network_is_told_from_the_keys(name, monkeypatch):
    with torch.device("meta"):
        state = backbones.get_model(name, 16).state_dict()
    monkeypatch.setattr(backbones, "read_state", lambda path: state)
    assert backbones.find_network("a.pt") == SAME_KEYS.get(name, name)


def test_networks_with_the_same_keys_differ_in_training_only():
    groups = {}
    for name in backbones.names():
        groups.setdefault(tuple(backbones._shapes(name, 16).items()), []).append(name)
    same = {other: first for first, *others in groups.values() for other in others}
    assert same == SAME_KEYS
    for name, first in same.items():  # what follows width and depth, a VisionTransformer uses in training alone
        assert VIT_SIZES[name][:2] == VIT_SIZES[first][:2]


def test_a_network_that_is_given_none(tiny, tmp_path):
    path = saved(tiny.state_dict(), tmp_path)
    model = backbones.load_backbone(path)
    images = torch.randn(2, 3, 112, 112)
    with torch.inference_mode():
        assert torch.equal(model(images), tiny(images))
    state = tiny.state_dict()
    del state["layers.1.weight"]
    message = "model.pt: matches no network; nearest are tiny, .*; as tiny: missing layers.1.weight;"
    for read in (backbones.load_backbone, backbones.find_network):
        with pytest.raises(ValueError, match=message):
            read(saved(state, tmp_path))
