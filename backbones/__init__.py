"""Networks by name, and loading their checkpoints.

    model = backbones.get_model("r18", num_features=512)
    model = backbones.load_backbone("work_dirs/f512_r18_arc_class30/model.pt", "r18", device)

Each maps images float32 [B, 3, 112, 112], RGB, (x/255 − 0.5)/0.5, to embeddings float32 [B, num_features], not
normalised. A model's `num_features` is the width of its embedding.
"""

import difflib
import functools

import torch

from backbones.checkpoint import BackboneError, few, read_state
from backbones.iresnet import DEPTHS, IResNet
from backbones.iresnet2060 import IResNet2060
from backbones.mobilefacenet import SIZES as MBF_SIZES
from backbones.mobilefacenet import MobileFaceNet
from backbones.tiny import Tiny
from backbones.vit import SIZES as VIT_SIZES
from backbones.vit import VisionTransformer

TINY_WIDTHS = {"tiny": 1, "tiny_x2": 2}
WITH_HEAD = ("r18", "r34", "r50", "tiny", "tiny_x2")

# The last linear layer, [embedding size, …], of IResNet and tiny, MobileFaceNet, vision transformers.
_LAST_LINEAR = ("fc.weight", "features.layers.2.weight", "feature.2.weight")


def names():
    """All names for `get_model`."""
    return (*DEPTHS, "r2060", *MBF_SIZES, *VIT_SIZES, *TINY_WIDTHS)


def get_model(name, num_features=512, dropout=0.0, fp16=False, num_classes=None):
    """A freshly initialised network.

    name: one of `names()`; num_features: width D of the embedding; dropout: probability before the last linear
    layers; fp16: half precision on CUDA except for the last layers (the CPU stays float32); num_classes: adds the
    softmax head `cls_fc` to r18, r34, r50, tiny and tiny_x2, whose forward then returns class logits [B, num_classes]
    in training mode and the embedding in eval mode (`embed(images)` in both).
    Raises BackboneError (a ValueError) for an unknown name, or num_classes with a network that has no head.
    """
    _check_name(name)
    if num_classes is not None and name not in WITH_HEAD:
        raise BackboneError(f"{name} has no softmax head (num_classes={num_classes}); {', '.join(WITH_HEAD)} have one")
    common = {"num_features": num_features, "dropout": dropout, "fp16": fp16}
    if name in DEPTHS:
        return IResNet(DEPTHS[name], num_classes=num_classes, **common)
    if name == "r2060":
        return IResNet2060(**common)
    if name in MBF_SIZES:
        return MobileFaceNet(*MBF_SIZES[name], **common)
    if name in VIT_SIZES:
        return VisionTransformer(*VIT_SIZES[name], **common)
    return Tiny(TINY_WIDTHS[name], num_classes=num_classes, **common)


def _check_name(name):
    if name not in names():
        near = difflib.get_close_matches(str(name), names(), n=3, cutoff=0.5)
        nearest = f"did you mean {' or '.join(near)}? " if near else ""
        raise BackboneError(f"unknown network {name!r}: {nearest}available are {', '.join(names())}")


def embedding_size(state):
    """Width of the embedding, from the last linear layer in any network's state dict."""
    for key in _LAST_LINEAR:
        if key in state and state[key].dim() == 2:
            return state[key].shape[0]
    raise BackboneError(f"no embedding layer: none of {', '.join(_LAST_LINEAR)} among its keys {few(list(state))}")


def load_backbone(path, network=None, device="cpu", fp16=False):
    """The feature extractor in a file (see `read_state`): a model on `device` in eval mode, without head.

    network: None = `find_network`'s. The embedding size comes from the file and is `model.num_features`. All keys and
    shapes of the state dict must match. Draws no random numbers.
    Raises FileNotFoundError, or BackboneError naming file, network and the mismatch.
    """
    if network is not None:
        _check_name(network)
    state = read_state(path)
    size = _size(state, path)
    network = network or _told_from(state, size, path)
    differences = _differences(network, state, size)
    if differences:
        fitting = [name for name in names() if name != network and not _differences(name, state, size)]
        advice = f"the file matches {' or '.join(fitting)}" if fitting else "it matches no other network either"
        raise BackboneError(f"{path}: not a {network}: {_in_words(differences)}; {advice}")
    model = _skeleton(network, size, fp16)
    # The skeleton has no storage; it takes over the file's tensors.
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device).eval()


def find_network(path):
    """Name of the network that a file's state dict matches; raises as `load_backbone`, naming the nearest if none."""
    state = read_state(path)
    return _told_from(state, _size(state, path), path)


def _size(state, path):
    try:
        return embedding_size(state)
    except BackboneError as error:
        raise BackboneError(f"{path}: {error}") from None


def _told_from(state, size, path):
    """The first network that matches. Others that do differ only in training (stochastic depth, mask ratio)."""
    found = {}
    for name in names():
        found[name] = _differences(name, state, size)
        if not found[name]:
            return name
    nearest = sorted(found, key=lambda name: sum(map(len, found[name].values())))[:3]
    raise BackboneError(
        f"{path}: matches no network; nearest are {', '.join(nearest)}; "
        f"as {nearest[0]}: {_in_words(found[nearest[0]])}; check the file"
    )


def _skeleton(network, num_features, fp16=False):
    """The network without storage: shapes only."""
    with torch.device("meta"):
        return get_model(network, num_features, fp16=fp16)


@functools.cache
def _shapes(network, num_features):
    """{key: shape} of the network's state dict."""
    return {key: value.shape for key, value in _skeleton(network, num_features).state_dict().items()}


def _differences(network, state, size):
    """How a state dict differs from that of the network with `size` features: {what: [keys]}, empty if it does not."""
    expected = _shapes(network, size)
    found = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "wrong shape:": [
            f"{key} is {list(state[key].shape)} instead of {list(shape)}"
            for key, shape in expected.items()
            if key in state and state[key].shape != shape
        ],
    }
    return {what: keys for what, keys in found.items() if keys}


def _in_words(differences):
    return "; ".join(f"{what} {few(keys)}" for what, keys in differences.items())
