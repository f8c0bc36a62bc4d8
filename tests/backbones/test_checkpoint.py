"""Checkpoints in circulation: each row of the tables, and errors on other files."""

import argparse
import collections
import io
import pickle
import re
import sys
import zipfile

import pytest
import torch

import backbones
from backbones.checkpoint import CONTAINERS, HEADS, PREFIXES
from tests.backbones.test_registry import PUBLISHED, published_keys


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = backbones.get_model("tiny", 24)
    for part in model.modules():
        if isinstance(part, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            part.num_batches_tracked.fill_(7)
    return model.eval()


@pytest.fixture
def state(model):
    return dict(model.state_dict())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def check_loads(content, path, state):
    """`content`, saved, is read as `state`, and the network loads it strictly."""
    torch.save(content, path)
    loaded = backbones.load_backbone(path, "tiny").state_dict()
    for found in (loaded, backbones.read_state(path)):
        assert found.keys() == state.keys()
        for key, value in state.items():
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize(
    "prefix",
    [
        *PREFIXES,
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.backbone.",
        "backbone.module.",
        "net.model.",
        "module.module.",
        "model.module._orig_mod.backbone.net.",
    ],
)
def test_prefixes(prefix, path, state):
    check_loads({prefix + key: value for key, value in state.items()}, path, state)


@pytest.mark.parametrize(
    "names",
    [*[(name,) for name in CONTAINERS], ("model", "state_dict"), ("state_dict", "model", "backbone"), ("model",) * 3],
)
def test_containers(names, path, state):
    content = collections.OrderedDict((f"module.{key}", value) for key, value in state.items())
    for name in reversed(names):
        optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
        content = {
            "epoch": 3,
            "state_dict_softmax_fc": {"weight": torch.zeros(5, 24)},
            name: content,
            "optimizer": optimizer,
            "arch": "tiny",
        }
    check_loads(content, path, state)


def test_the_rows_of_published_runs_are_there():
    assert {"state_dict", "state_dict_backbone", "model", "backbone"} <= set(CONTAINERS)
    assert {"module.", "_orig_mod.", "backbone.", "model.", "net."} <= set(PREFIXES)


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone."])
@pytest.mark.parametrize(
    "key",
    [
        *[f"{head.strip('*')}.weight" for head in HEADS],
        "BCT_FC.weight",
        "discriminator.net.0.bias",
        "eboundary.boundary",
        "cls_fc.weight",
        "cls_fc.bias",
        "head.weight",
        "head.norm.weight",
        "old_cls_fc.weight",
        "cls_head.fc.bias",
    ],
)
def test_heads(key, prefix, path, state):
    content = {prefix + name: value for name, value in state.items()}
    check_loads({f"{prefix}{key}": torch.zeros(5, 24), **content}, path, state)


def test_a_classifier_beside_the_backbone(path, state):
    content = {f"backbone.{key}": value for key, value in state.items()}
    check_loads({"fc.weight": torch.zeros(5, 24), "fc.bias": torch.zeros(5), **content}, path, state)


def test_two_networks_in_one(path, state):
    torch.save({f"{prefix}.{key}": value for prefix in ("model", "backbone") for key, value in state.items()}, path)
    with pytest.raises(ValueError, match="model.pt: contains two networks, under 'model.' and 'backbone.'; save"):
        backbones.read_state(path)


def test_no_num_batches_tracked(path, state):
    content = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    for key in state.keys() - content.keys():
        state[key] = torch.tensor(0)
    check_loads(content, path, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision(dtype, path, state):
    content = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    expected = {key: value.float() if value.is_floating_point() else value for key, value in content.items()}
    check_loads(content, path, expected)


def test_the_format_before_torch_1_6(path, state):
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
    assert all(torch.equal(value, state[key]) for key, value in backbones.read_state(path).items())


def test_safetensors(tmp_path, model, state):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    content = {f"module.{key}": value.half() if value.is_floating_point() else value for key, value in state.items()}
    safetensors.save_file(content | {"module.head.weight": torch.zeros(5, 24)}, path)
    loaded = backbones.load_backbone(path, "tiny")
    assert all(torch.equal(value, content[f"module.{key}"].to(value)) for key, value in loaded.state_dict().items())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors: not readable; truncated, or not a safetensors file"):
        backbones.read_state(path)


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="a.safetensors: .safetensors files need safetensors: pip install safetensors"):
        backbones.read_state(tmp_path / "a.safetensors")


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
@pytest.mark.parametrize("network", PUBLISHED["networks"])
def test_prefixes_and_heads_match_no_key_of_a_network(network, prefix, monkeypatch):
    content = {prefix + key: torch.zeros(shape, device="meta") for key, shape in published_keys(network)}
    monkeypatch.setattr(backbones.checkpoint, "_load", lambda path: content)
    keys = [key for key, _ in published_keys(network) if not key.startswith("cls_fc.")]
    assert list(backbones.read_state("a.pt")) == keys


# --- What is no state dict -------------------------------------------------------------------------------------------


class Unwelcome:
    """Pickles as a call; a loader that unpickles anything would run it."""

    def __reduce__(self):
        return (pytest.exit, ("code in the file was run",))


def refusal(path):
    """The error on a file, which must not repeat torch's advice."""
    with pytest.raises(backbones.BackboneError) as caught:
        backbones.load_backbone(path, "tiny")
    text, cause = str(caught.value), caught.value.__cause__
    assert text.startswith(f"{path}: ") and "\n" not in text
    assert "weights_only" not in text and "eights only" not in text
    assert cause is None and (caught.value.__context__ is None or caught.value.__suppress_context__), "a traceback's"
    return text


@pytest.mark.parametrize(
    "content, said",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 174664\n",
            "Git LFS pointer.*: git lfs pull",
        ),
        (b"<!DOCTYPE html><html><head><title>Google Drive</title>", "a web page, not a model"),
        (b"\n  <HTML>", "a web page"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>", "a web page"),
        (b"", "not readable; truncated"),
        (b"\x08\x07\x12\x07pytorch", "not readable; truncated"),
        (b"PK\x03\x04", "not readable; truncated, or not a state dict of torch.save: copy or download it again"),
    ],
)
def test_files_of_another_kind(content, said, path):
    path.write_bytes(content)
    assert re.search(said, refusal(path))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside", [lambda model: model, lambda model: {"epoch": 3, "model": model}])
def test_a_whole_pickled_module(inside, zipped, path, model):
    torch.save(inside(model), path, _use_new_zipfile_serialization=zipped)
    said = refusal(path)
    assert "pickled module (backbones.tiny.Tiny)" in said and "torch.save(model.state_dict(), …)" in said


def test_a_torchscript_archive(path, model, recwarn):
    torch.jit.save(torch.jit.trace(model.fc, torch.zeros(1, model.fc.in_features)), path)
    recwarn.clear()
    assert "is a TorchScript archive" in refusal(path) and "torch.jit.load" in refusal(path)
    assert not [warning for warning in recwarn if "torch.load" in str(warning.message)]


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_file_is_not_run(save, path, recwarn):
    save({"fc.weight": Unwelcome()}, path)
    assert "contains Python objects (_pytest.outcomes." in refusal(path) and not recwarn


def test_python_objects_beside_the_weights(path, state):
    torch.save({"args": argparse.Namespace(lr=0.1), "model": state}, path)
    assert "contains Python objects (argparse.Namespace), loading them would run code" in refusal(path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file(share, zipped, path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    path.write_bytes(buffer.getvalue()[: int(share * len(buffer.getvalue()))])
    assert "not readable; truncated" in refusal(path)


def test_a_zip_of_something_else(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not readable; truncated, or not a state dict" in refusal(path)


def test_a_directory(tmp_path):
    assert "cannot be read (Is a directory); check path and disk" in refusal(tmp_path)


def itself():
    content = {"epoch": 3}
    content["model"] = content
    return content


@pytest.mark.parametrize(
    "content, held",
    [
        ({"epoch": 3, "state_dict": {}}, "a dict with keys epoch, state_dict,"),
        (torch.zeros(3), "a Tensor,"),
        ({}, "a dict,"),
        ({"model": {"a": 1, "b": 2, "c": 3, "d": 4}}, "a dict with keys a, b, c and 1 more,"),
        (itself(), "a dict with keys epoch, model,"),
        ([torch.zeros(3)], "a list,"),
        ({1: torch.zeros(3)}, "keys 1"),
    ],
)
def test_a_file_of_something_else(content, held, path):
    torch.save(content, path)
    text = refusal(path)
    assert "contains a" in text and held in text
    assert "not the state dict of a network" in text
