"""Reading model files: what loads, and what the error says where one does not."""

import collections

import pytest
import torch

import backbones


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
    with pytest.raises(ValueError, match="no embedding layer among the keys: none of fc.weight, features.lay"):
        backbones.embedding_size({"weight": torch.zeros(3, 3)})


def test_heads_and_the_parallel_wrapper_are_left_out(tiny, tmp_path):
    state = {f"module.{key}": value for key, value in tiny.state_dict().items()}
    state["module.cls_fc.weight"], state["module.cls_fc.bias"] = torch.randn(5, 24), torch.randn(5)
    state["old_cls_fc.weight"], state["classifier.weight"] = torch.randn(5, 24), torch.randn(5, 24)
    path = saved(collections.OrderedDict(state), tmp_path)
    model = backbones.load_backbone(path, "tiny")
    assert list(model.state_dict()) == list(tiny.state_dict())
    images = torch.randn(2, 3, 112, 112)
    with torch.inference_mode():
        assert torch.equal(model.train(False)(images), tiny(images))
    assert torch.equal(backbones.read_state(path)["cls_fc.weight"], state["module.cls_fc.weight"])


def test_no_key_of_a_network_is_taken_for_a_head():
    for name in set(backbones.names()) - {"r2060"}:
        with torch.device("meta"):
            state = backbones.get_model(name).state_dict()
        assert not [key for key in state if backbones._HEAD.match(key)], name


def test_a_half_precision_file_becomes_float32(tiny, tmp_path):
    model = backbones.load_backbone(saved(tiny.half().state_dict(), tmp_path), "tiny")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}
    assert model(torch.randn(1, 3, 112, 112)).dtype == torch.float32


def test_wrong_network_names_the_one_that_fits(tiny, tmp_path):
    path = saved(tiny.state_dict(), tmp_path)
    lacking = "model.pt: not a r18: lacks conv1.weight, .* more; has beyond it layers.0.weight, .*; the file fits tiny$"
    with pytest.raises(ValueError, match=lacking):
        backbones.load_backbone(path, "r18")
    shapes = r"not a tiny_x2: differs in shape: layers.0.weight is \[16, 3, 5, 5\] and not \[32, 3, 5, 5\]"
    with pytest.raises(ValueError, match=shapes):
        backbones.load_backbone(path, "tiny_x2")


def test_a_file_that_fits_nothing(tiny, tmp_path):
    state = tiny.state_dict()
    del state["layers.4.running_mean"]
    state["layers.0.bias"] = torch.zeros(16)
    path = saved(state, tmp_path)
    message = "lacks layers.4.running_mean; has beyond it layers.0.bias; it fits no other network"
    with pytest.raises(ValueError, match=message):
        backbones.load_backbone(path, "tiny")
    with pytest.raises(ValueError, match="not a tiny: no embedding layer"):
        backbones.load_backbone(saved({"weight": torch.zeros(2)}, tmp_path), "tiny")


def test_unknown_network_comes_before_the_file(tmp_path):
    with pytest.raises(ValueError, match="unknown network 'tinny': did you mean tiny"):
        backbones.load_backbone(tmp_path / "absent.pt", "tinny")


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pt: no such model file"):
        backbones.load_backbone(tmp_path / "absent.pt", "tiny")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file(tiny, tmp_path, share):
    path = saved(tiny.state_dict(), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])
    with pytest.raises(ValueError, match="model.pt: not readable; truncated"):
        backbones.load_backbone(path, "tiny")


class Unwelcome:
    """Pickles as a call; a loader that unpickles anything would run it."""

    def __reduce__(self):
        return (pytest.fail, ("code in the file was run",))


def test_code_in_a_file_is_not_run(tmp_path):
    with pytest.raises(ValueError, match="model.pt: not readable"):
        backbones.load_backbone(saved({"fc.weight": Unwelcome()}, tmp_path), "tiny")


@pytest.mark.parametrize(
    "content, held",
    [({"epoch": 3, "state_dict": {}}, "a dict with keys epoch, state"), (torch.zeros(3), "a Tensor"), ({}, "a dict")],
)
def test_a_file_of_something_else(tmp_path, content, held):
    with pytest.raises(ValueError, match=f"model.pt: holds {held}.* and not the state dict of a network"):
        backbones.load_backbone(saved(content, tmp_path), "tiny")
