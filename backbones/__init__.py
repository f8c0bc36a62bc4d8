"""The networks by name, and checkpoints of them.

    model = backbones.get_model("r18", num_features=512)
    model = backbones.load_backbone("work_dirs/f512_r18_arc_class30/model.pt", "r18", device)

Each takes images float32 [B, 3, 112, 112], RGB, (x/255 − 0.5)/0.5, and gives the embedding [B, num_features] in
float32, not normalised. A model's `num_features` is the width of its embedding.
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

# The last linear layer, [embedding size, …], of IResNet and tiny, of MobileFaceNet and of the vision transformers.
_LAST_LINEAR = ("fc.weight", "features.layers.2.weight", "feature.2.weight")


def names():
    """Every name that `get_model` knows."""
    return (*DEPTHS, "r2060", *MBF_SIZES, *VIT_SIZES, *TINY_WIDTHS)


def get_model(name, num_features=512, dropout=0.0, fp16=False, num_classes=None):
    """A freshly initialised network.

    name: one of `names()`; num_features: width D of the embedding; dropout: probability in front of the last
    linear layers; fp16: half precision on CUDA for all but the embedding's end (the CPU stays float32);
    num_classes: adds the softmax head `cls_fc` to r18, r34, r50, tiny and tiny_x2, whose forward then returns class
    logits [B, num_classes] in training and the embedding in evaluation (`embed(images)` gives it in both).
    Raises BackboneError (a ValueError) for an unknown name, or a head on a network that has none.
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
        raise BackboneError(f"unknown network {name!r}: {nearest}known are {', '.join(names())}")


def embedding_size(state):
    """Width of the embedding, from the last linear layer in a state dict of any of the networks."""
    for key in _LAST_LINEAR:
        if key in state and state[key].dim() == 2:
            return state[key].shape[0]
    raise BackboneError(
        f"no embedding layer among the keys: none of {', '.join(_LAST_LINEAR)}; the keys are {few(list(state))}"
    )


def load_backbone(path, network=None, device="cpu", fp16=False):
    """The feature extractor saved in a file that `read_state` knows: a model on `device` in eval mode, without head.

    network: None takes the one that `find_network` tells. The embedding size is read from the file and is
    `model.num_features`. Of the state dict all keys and shapes must match. Draws no random numbers.
    Raises FileNotFoundError, or BackboneError naming file, network and what does not fit.
    """
    if network is not None:
        _check_name(network)
    state = read_state(path)
    size = _size(state, path)
    network = network or _told_from(state, size, path)
    differences = _differences(network, state, size)
    if differences:
        fitting = [name for name in names() if name != network and not _differences(name, state, size)]
        advice = f"the file fits {' or '.join(fitting)}" if fitting else "it fits no other network either"
        raise BackboneError(f"{path}: not a {network}: {_in_words(differences)}; {advice}")
    model = _skeleton(network, size, fp16)
    # The skeleton holds no memory: it takes the file's tensors as they are.
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device).eval()


def find_network(path):
    """Name of the network whose state dict a file holds; raises as `load_backbone`, naming the nearest if none fits."""
    state = read_state(path)
    return _told_from(state, _size(state, path), path)


def _size(state, path):
    try:
        return embedding_size(state)
    except BackboneError as error:
        raise BackboneError(f"{path}: {error}") from None


def _told_from(state, size, path):
    """The first network that fits. If others do, they differ in training only (stochastic depth, mask ratio)."""
    found = {}
    for name in names():
        found[name] = _differences(name, state, size)
        if not found[name]:
            return name
    nearest = sorted(found, key=lambda name: sum(map(len, found[name].values())))[:3]
    raise BackboneError(
        f"{path}: fits no network; nearest are {', '.join(nearest)}; as {nearest[0]} it {_in_words(found[nearest[0]])}"
    )


def _skeleton(network, num_features, fp16=False):
    """The network without storage: shapes alone."""
    with torch.device("meta"):
        return get_model(network, num_features, fp16=fp16)


@functools.cache
def _shapes(network, num_features):
    """{key: shape} of the network's state dict."""
    return {key: value.shape for key, value in _skeleton(network, num_features).state_dict().items()}


def _differences(network, state, size):
    """How a state dict departs from that of the network with `size` features: {verb: [keys]}, empty if it does not."""
    expected = _shapes(network, size)
    found = {
        "lacks": [key for key in expected if key not in state],
        "has beyond it": [key for key in state if key not in expected],
        "differs in shape:": [
            f"{key} is {list(state[key].shape)} and not {list(shape)}"
            for key, shape in expected.items()
            if key in state and state[key].shape != shape
        ],
    }
    return {verb: keys for verb, keys in found.items() if keys}


def _in_words(differences):
    return "; ".join(f"{verb} {few(keys)}" for verb, keys in differences.items())
