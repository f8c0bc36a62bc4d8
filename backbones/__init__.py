"""The networks by name, and checkpoints of them.

    model = backbones.get_model("r18", num_features=512)
    model = backbones.load_backbone("work_dirs/f512_r18_arc_class30/model.pt", "r18", device)

Each takes images float32 [B, 3, 112, 112], RGB, (x/255 − 0.5)/0.5, and gives the embedding [B, num_features] in
float32, not normalised. A model's `num_features` is the width of its embedding.
"""

import difflib
import re

import torch

from backbones.iresnet import DEPTHS, IResNet
from backbones.iresnet2060 import IResNet2060
from backbones.mobilefacenet import SIZES as MBF_SIZES
from backbones.mobilefacenet import MobileFaceNet
from backbones.tiny import Tiny
from backbones.vit import SIZES as VIT_SIZES
from backbones.vit import VisionTransformer
from engine.errors import UserError

TINY_WIDTHS = {"tiny": 1, "tiny_x2": 2}
WITH_HEAD = ("r18", "r34", "r50", "tiny", "tiny_x2")

# The last linear layer, [embedding size, …], of IResNet and tiny, of MobileFaceNet and of the vision transformers.
_LAST_LINEAR = ("fc.weight", "features.layers.2.weight", "feature.2.weight")

# Classifiers that training scripts save along with a network: cls_fc, old_cls_fc, classifier, cls_head, …
_HEAD = re.compile(r"[a-z0-9_]*(cls|classifier|head|logit)[a-z0-9_]*\.", re.IGNORECASE)


class BackboneError(UserError, ValueError):
    """A network name or a model file that cannot be used; the message names it and says what would fit."""


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


def read_state(path):
    """State dict of a .pt file, on the CPU, heads included, with the `module.` of a parallel wrapper removed.

    Only tensors are unpickled. Raises FileNotFoundError, or BackboneError for a file that is truncated, no torch
    file, or something other than a state dict.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such model file") from None
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise BackboneError(
            f"{path}: not readable; truncated, or not a state dict of torch.save ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        keys = f" with keys {_few([str(key) for key in state])}" if isinstance(state, dict) else ""
        held = f"a {type(state).__name__}{keys}"
        raise BackboneError(f"{path}: holds {held} and not the state dict of a network; give the model.pt of a run")
    return {re.sub(r"^(module\.)+", "", key): value for key, value in state.items()}


def embedding_size(state):
    """Width of the embedding, from the last linear layer in a state dict of any of the networks."""
    for key in _LAST_LINEAR:
        if key in state:
            return state[key].shape[0]
    raise BackboneError(f"no embedding layer among the keys: none of {', '.join(_LAST_LINEAR)}")


def load_backbone(path, network, device="cpu", fp16=False):
    """The feature extractor saved in a .pt file: a model on `device` in eval mode, without softmax head.

    The embedding size is read from the file and is `model.num_features`. Keys of heads (`cls_fc.*` and the like) are
    left out, all others must match in name and shape. Draws no random numbers.
    Raises FileNotFoundError, or BackboneError naming file, network and what does not fit.
    """
    _check_name(network)
    state = {key: value for key, value in read_state(path).items() if not _HEAD.match(key)}
    differences = _differences(network, state)
    if differences:
        fitting = [name for name in names() if name != network and not _differences(name, state)]
        advice = f"the file fits {' or '.join(fitting)}" if fitting else "it fits no other network either"
        raise BackboneError(f"{path}: not a {network}: {'; '.join(differences)}; {advice}")
    model = _skeleton(network, embedding_size(state), fp16)
    # The skeleton holds no memory: it takes the file's tensors as they are, once in float32.
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device).eval()


def _skeleton(network, num_features, fp16=False):
    """The network without storage: shapes alone."""
    with torch.device("meta"):
        return get_model(network, num_features, fp16=fp16)


def _differences(network, state):
    """How a state dict departs from the network's, in words; empty if it does not."""
    try:
        size = embedding_size(state)
    except BackboneError as error:
        return [str(error)]
    expected = _skeleton(network, size).state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {list(state[key].shape)} and not {list(value.shape)}"
        for key, value in expected.items() if key in state and state[key].shape != value.shape
    ]
    kinds = (("lacks", missing), ("has beyond it", unexpected), ("differs in shape:", shapes))
    return [f"{verb} {_few(found)}" for verb, found in kinds if found]


def _few(items, limit=3):
    """The first few of many, in words."""
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
