"""Reads checkpoints in circulation into one form: the network's own keys, float32, on the CPU.

The three tables below say what is unwrapped, stripped and dropped. Only tensors and plain values are unpickled: no file
runs code here.
"""

import contextlib
import errno
import fnmatch
import pickletools
import re
import warnings
import zipfile

import torch

from core.errors import UserError

# Entries that contain the state dict, most specific first, possibly nested, beside epoch, optimizer, ….
CONTAINERS = ("state_dict_backbone", "backbone", "state_dict", "model")

# Prefixes of the keys, in any combination: of DataParallel and DDP, torch.compile, a wrapping module.
PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "net.")

# First part of the keys, in upper or lower case, of heads that training scripts save with a network.
HEADS = ("*cls*", "*classifier*", "*head*", "*logit*", "bct_fc", "discriminator", "eboundary")

_PREFIX = re.compile(f"({'|'.join(map(re.escape, PREFIXES))})*")
_HEAD = re.compile("|".join(map(fnmatch.translate, HEADS)), re.IGNORECASE)

# Start of a file that is something else -> what it is, and what to do.
_FOREIGN = {
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it: git lfs pull",
    rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)": "a web page, not a model; download it in a browser",
}


class BackboneError(UserError, ValueError):
    """An unusable network name or model file; the message names it and what would fit."""


def read_state(path):
    """State dict of the network in a .pt, .pth or .safetensors file: {key: tensor on the CPU}, floats as float32.

    Keys are the network's own: containers are opened, prefixes stripped, heads dropped; `num_batches_tracked`, missing
    in old files, is 0. Raises FileNotFoundError, or BackboneError that says what the file is instead.
    """
    content = _load(path)
    inner = _unwrapped(content)
    entries = inner.items() if isinstance(inner, dict) else ()
    tensors = {key: value for key, value in entries if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not tensors:
        shown = inner if entries else content
        keys = f" with keys {few([str(key) for key in shown])}" if isinstance(shown, dict) and shown else ""
        raise BackboneError(
            f"{path}: contains a {type(shown).__name__}{keys}, not the state dict of a network; use a run's model.pt"
        )
    state = _own_keys(tensors, path)
    for key in [key for key in state if key.endswith(".running_mean")]:
        state.setdefault(key.removesuffix("running_mean") + "num_batches_tracked", torch.tensor(0))
    state = {key: value.detach() for key, value in state.items()}
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def few(items, limit=3):
    """As in: a, b, c and 5 more."""
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _unwrapped(content, depth=8):
    """The content of nested containers; of limited depth, because a pickle can contain itself."""
    for _ in range(depth):
        if not isinstance(content, dict):
            break
        inner = [content[name] for name in CONTAINERS if isinstance(content.get(name), dict)]
        if not inner:
            break
        content = inner[0]
    return content


def _own_keys(tensors, path):
    """The network's tensors by keys without prefix, and without heads.

    A classifier `fc.weight` (no prefix) may be beside the network (prefix `backbone.`): of two keys that become equal,
    the one whose prefix has most keys wins. More than two such pairs (a layer's weight and bias) are two networks.
    """
    groups = {}
    for key, value in tensors.items():
        prefix = _PREFIX.match(key)[0]
        bare = key[len(prefix) :]
        first, dot, _ = bare.partition(".")
        if not (dot and _HEAD.match(first)):
            groups.setdefault(prefix, {})[bare] = value
    groups = sorted(groups.items(), key=lambda item: -len(item[1]))
    own = {}
    for prefix, group in groups:
        if len(group.keys() & own.keys()) > 2:
            raise BackboneError(
                f"{path}: contains two networks, under {groups[0][0]!r} and {prefix!r}; save the state dict of one"
            )
        own |= {bare: value for bare, value in group.items() if bare not in own}
    return own


def _load(path):
    """The content of a file, tensors and plain values only. Raises as `read_state`."""
    try:
        _refuse_foreign(path)
        if str(path).endswith(".safetensors"):
            return _load_safetensors(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warning about the pickle protocol; _why_not is clearer
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such model file") from None
    except (BackboneError, MemoryError):
        raise
    except Exception as error:  # without torch's message, which suggests letting the file run code
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # those mean a truncated file
            raise BackboneError(f"{path}: cannot be read ({error.strerror}); check path and disk") from None
        raise BackboneError(f"{path}: {_why_not(path)}") from None


def _load_safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise BackboneError(f"{path}: .safetensors files need safetensors: pip install safetensors") from None
    return load_file(path)


def _refuse_foreign(path):
    """Raise BackboneError for a known kind of wrong file."""
    with open(path, "rb") as file:
        head = file.read(512)
    for pattern, what in _FOREIGN.items():
        if re.match(pattern, head, re.IGNORECASE):
            raise BackboneError(f"{path}: is {what}")
    if head.startswith(b"PK") and any(name.endswith("/constants.pkl") for name in _names_in_zip(path)):
        raise BackboneError(
            f"{path}: is a TorchScript archive, code with weights; if you trust it, save only the weights: "
            "torch.save(torch.jit.load(…).state_dict(), …)"
        )


def _names_in_zip(path):
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:  # a damaged archive counts as empty
        return archive.namelist()
    return []


def _why_not(path):
    """Why a file does not load, and what to do."""
    classes, strings = _pickled_names(path)
    usual = r"collections\..*|torch\._utils\..*|torch\.storage\..*|torch\.[A-Za-z0-9]+"  # the last: storages, dtypes
    unknown = [name for name in dict.fromkeys(classes) if not re.fullmatch(usual, name)]
    if "_modules" in strings:
        return (
            f"is a pickled module ({''.join(unknown[:1])}), loading it would run code; where it was made, save only "
            "its weights: torch.save(model.state_dict(), …)"
        )
    if unknown:
        return (
            f"contains Python objects ({few(unknown)}), loading them would run code; where it was made, save only the "
            "weights: torch.save(model.state_dict(), …)"
        )
    kind = "safetensors file" if str(path).endswith(".safetensors") else "state dict of torch.save"
    return f"not readable; truncated, or not a {kind}: copy or download it again"


def _pickled_names(path):
    """`(classes, strings)` named in a file's pickles, read from their opcodes without running them."""
    classes, strings = [], []
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:  # until the end, or the damage
        stream = stack.enter_context(open(path, "rb"))
        for name in _names_in_zip(path):
            if name.endswith("data.pkl"):
                stream = stack.enter_context(stack.enter_context(zipfile.ZipFile(path)).open(name))
        for _ in range(4):  # before torch 1.6, three short pickles came first
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    classes.append(argument.replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    classes.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return classes, strings
