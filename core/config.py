"""Config files: plain Python that defines `config`, an EasyDict, in layers.

The layers of a run's config, each overriding the ones before:

1. `configs/base.py` at the repo root, which declares every shared key;
2. `configs/base.py` beside the train.py that is started, wherever the file lies (a method's own keys and defaults),
   then `base.py` in the nearest directory named `configs` above the file;
3. for a file in a sub-directory, such as `configs/demo/`: the `base.py` of that sub-directory, in the same order;
4. the scenario that the file names, one of `configs/scenarios/`: the data, and the old model's files;
5. the file itself;
6. the environment variable BCT_OVERRIDES, such as `--network tiny --num_epoch 1`, to try a whole flow quickly;
7. `--key value` from the command line.

Only `base.py` files may declare keys; the first declaration gives a key its type. An undeclared key is an error that
names the nearest declared one.
"""

import ast
import difflib
import math
import os
import pathlib
import re
import runpy
import shlex

from easydict import EasyDict

from core.errors import UserError

REPO = pathlib.Path(__file__).resolve().parents[1]

# Keys that are paths, relative to `workspace`.
PATH_KEYS = (
    "rec",
    "rec_val",
    "output",
    "init_backbone",
    "old_embedding",
    "old_embedding_label",
    "credible_old_feature",
    "old_prototype",
    "old_model_path",
    "center_radius",
)


# Allowed values of the shared keys; a method checks its own with `require`.
RANGES = {
    "embedding_size": (lambda v: v > 0, "above 0"),
    "dropout": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "margin_list": (
        lambda v: len(v) == 3 and all(isinstance(m, (int, float)) for m in v) and 0 <= v[1] < math.pi,
        "three numbers, (m1, m2, m3), with m2 at least 0 and below pi",
    ),
    "decay_epoch": (lambda v: all(isinstance(epoch, (int, float)) for epoch in v), "a list of numbers"),
    "margin_scale": (lambda v: v > 0, "above 0"),
    "sample_rate": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "lr": (lambda v: v > 0, "above 0"),
    "momentum": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "weight_decay": (lambda v: v >= 0, "at least 0"),
    "batch_size": (lambda v: v > 0, "above 0"),
    "gradient_acc": (lambda v: v > 0, "above 0"),
    "num_epoch": (lambda v: v > 0, "above 0"),
    "warmup_epoch": (lambda v: v >= 0 or v == -1, "at least 0, or -1: decay from one epoch ahead"),
    "clip_grad_norm": (lambda v: v >= 0, "at least 0"),
    "num_classes": (lambda v: v >= 0, "at least 0"),
    "num_image": (lambda v: v >= 0, "at least 0"),
    "num_workers": (lambda v: v >= 0, "at least 0"),
    "seed": (lambda v: 0 <= v < 2**31, "at least 0 and below 2**31"),
    "amp_dtype": (lambda v: v in ("float16", "bfloat16"), '"float16" or "bfloat16"'),
    "optimizer": (lambda v: v in ("sgd", "adamw"), '"sgd" or "adamw"'),
    "val_targets": (lambda v: all(isinstance(name, str) for name in v), 'a list of names, like ["lfw"]'),
    "best_by": (lambda v: v in ("self", "cross"), '"self" or "cross"'),
    "checkpoint_steps": (lambda v: v >= 0, "at least 0"),
    "verbose": (lambda v: v > 0, "above 0"),
    "frequent": (lambda v: v > 0, "above 0"),
    "timeout": (lambda v: v > 0, "above 0"),
}


# Other repos' names of some keys, for the hint on an unknown one.
_USUAL_NAMES = {
    "learning_rate": "lr",
    "epochs": "num_epoch",
    "epoch": "num_epoch",
    "bs": "batch_size",
    "workers": "num_workers",
    "backbone": "network",
    "model": "network",
    "amp": "fp16",
    "bf16": "amp_dtype",
    "optim": "optimizer",
    "wd": "weight_decay",
}


_CLOSE = 0.7  # difflib's ratio of a typo; old_embedding and embedding_size have 0.67


class ConfigError(UserError):
    """An unusable config file, key or value. The message names the file and the key."""


def load_config(path, overrides=(), script=None):
    """Read the config file `path` over its bases and apply `overrides`.

    path: relative to the working directory or, if not found there, to the repo root.
    overrides: command-line arguments, `["--lr", "0.02"]` or `["--lr=0.02"]`; a flag alone, `["--resume"]`, means True.
    script: the train.py that is started: a config anywhere has its method's keys. None: only those of its own place.
    Returns an EasyDict of all keys; paths are absolute strings, `name` is the file's stem and `config_file` its path.
    Raises ConfigError.
    """
    path = _find(path)
    config, declared = EasyDict(), {}
    bases = _bases(path, script and pathlib.Path(script).resolve().parent)
    for base in bases:
        for key, value in _run(base).items():
            config[key] = _checked(key, value, declared.setdefault(key, value), base)
    layers = [] if path in bases else [(path, list(_run(path).items()))]
    declared_in = " and ".join(str(base).removeprefix(f"{REPO}/") for base in bases)
    for where, words in (("BCT_OVERRIDES", _words_of_environment()), ("the command line", overrides)):
        layers.append((where, list(_parse_overrides(words, where, declared, declared_in))))
    for where, layer in [_scenario_layer(config, layers, path), *layers]:
        for key, value in layer:
            config[key] = _checked(key, value, _declared(key, declared, where, declared_in), where)
    config.name = path.stem
    config.config_file = str(path)
    for key, (allowed, text) in RANGES.items():
        require(config, key, allowed(config[key]), text)
    return _resolve_paths(config)


def expand(path):
    """`path`, a text, with a leading ~ and $VARIABLES replaced, as a pathlib.Path; an argparse type, too.

    Raises ConfigError for a variable that is not set.
    """

    def value(match):
        name = match[1] or match[2]
        if name not in os.environ:
            raise ConfigError(f"{path}: ${name} is not set in the environment")
        return os.environ[name]

    return pathlib.Path(os.path.expanduser(re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, str(path))))


def require(config, key, condition, text):
    """Unless `condition`, raise a ConfigError that says what `key` must be: `text`, such as "at least 0"."""
    if not condition:
        raise ConfigError(f"{config.config_file}: {key} = {config[key]!r}; it must be {text}")


def _find(path):
    for candidate in (expand(path), REPO / path):
        if candidate.is_file():
            return candidate.resolve()
    raise ConfigError(f"{path}: no such config file, here or under {REPO}")


def _bases(path, method):
    """The base.py files that apply to `path`, outermost first; method: directory of the started script, or None."""
    roots, below = [REPO / "configs"], pathlib.Path()
    if method is not None:
        roots.append(method / "configs")
    for parent in path.parents:
        if parent.name == "configs":
            other = parent.parent
            if method not in (None, other) and other.parent == method.parent and (other / "train.py").is_file():
                raise ConfigError(f"{path}: a config of {other.name}; start it with {other / 'train.py'}")
            below = path.parent.relative_to(parent)
            roots.append(parent)
            break
    levels = [pathlib.Path(*below.parts[:depth]) for depth in range(len(below.parts) + 1)]
    candidates = dict.fromkeys(root / level / "base.py" for level in levels for root in roots)
    return [base for base in candidates if base.is_file()]


def _scenario_layer(config, layers, config_file):
    """`(where, keys)` of the scenario named by the last of `layers`, without paths that the method does not declare."""
    name = [config.scenario, *(value for _, layer in layers for key, value in layer if key == "scenario")][-1]
    if not name:
        return "", []
    path = REPO / "configs" / "scenarios" / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.py")))
        raise ConfigError(f"{config_file}: scenario = {name!r} is not in configs/scenarios/; choose one of {known}")
    return path, [(key, value) for key, value in _run(path).items() if key in config or key not in PATH_KEYS]


def _run(path):
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: defines no `config`; start it with `config = edict()`")
    return config


def _words_of_environment():
    text = os.environ.get("BCT_OVERRIDES", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"BCT_OVERRIDES={text}: {error}; close the quote") from error


def _parse_overrides(words, where, declared, declared_in):
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{where}: unexpected {word!r}; write --key value")
        key, equals, text = word[2:].partition("=")
        default = _declared(key, declared, where, declared_in)
        if equals or words and not words[0].startswith("--"):
            yield key, _value(text if equals else words.pop(0), default)
        elif isinstance(default, bool):
            yield key, True
        else:
            raise ConfigError(f"{where}: --{key} has no value")


def _value(text, default):
    """What `text` means for a key declared as `default`: a Python value, without its quotes if need be.

    Shells take the quotes of --val_targets ['lfw'] away, and `lfw,agedb_30` is a list without any.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    if isinstance(default, (tuple, list)) and not isinstance(value, (tuple, list)):
        return [_value(part.strip(), None) for part in text.strip("[]()").split(",") if part.strip()]
    return text if isinstance(default, str) and not isinstance(value, str) else value  # a run named 2024


def _declared(key, declared, where, declared_in):
    if key not in declared:
        near = difflib.get_close_matches(key, [*declared, *_USUAL_NAMES], 1, _CLOSE)
        hint = f"did you mean {_USUAL_NAMES.get(near[0], near[0])!r}? " if near else ""
        raise ConfigError(f"{where}: unknown key {key!r}; {hint}all keys are in {declared_in}")
    return declared[key]


def _checked(key, value, default, where):
    """`value` in the default's type; an int is accepted for a float, list and tuple for each other."""
    kinds = {bool: (bool,), int: (int,), float: (float, int), str: (str,), tuple: (tuple, list), list: (tuple, list)}
    allowed = kinds.get(type(default))
    if allowed is None or (isinstance(value, allowed) and (type(value) is not bool or bool in allowed)):
        return float(value) if type(default) is float else value
    if type(default) is int and isinstance(value, float) and value.is_integer():
        return int(value)
    raise ConfigError(
        f"{where}: {key} = {value!r} is a {type(value).__name__}; "
        f"it must be a {type(default).__name__}, like {default!r}"
    )


def _resolve_paths(config):
    workspace = REPO / expand(config.workspace)
    config.workspace = str(workspace)
    for key in PATH_KEYS:
        value = config.get(key)
        if value and value != "synthetic":
            config[key] = str(workspace / expand(value))
    config.output = config.output or str(workspace / "work_dirs" / config.name)
    if not config.rec_val and config.rec != "synthetic":
        rec = pathlib.Path(config.rec)
        config.rec_val = str(rec if rec.is_dir() else rec.parent)
    return config
