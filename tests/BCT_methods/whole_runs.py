"""Whole, small runs of a method: on its record set and old features, in this process, on ranks, or by the launcher."""

import os
import pathlib
import sys

import numpy as np
import torch

from core.config import load_config
from engine.checkpoint import complete_sets, read_done
from tests.ranks import run_session

REPO = pathlib.Path(__file__).resolve().parents[2]
WIDTH = 8
METHODS = sorted(path.parent.name for path in REPO.glob("BCT_methods/*/train.py"))


def write_old_features(folder, labels, width=WIDTH, seed=0):
    """Clustered features of any length: `<folder>/old_feature.npy`, `old_label.npy`, `old_avg_feature.npy`."""
    random = np.random.default_rng(seed)
    labels = np.asarray(labels)
    centres = random.normal(size=(labels.max() + 1, width))
    rows = centres[labels] + 0.4 * random.normal(size=(len(labels), width))
    rows *= random.uniform(0.5, 20, (len(labels), 1))
    member = labels == np.arange(len(centres))[:, None]
    np.save(folder / "old_feature.npy", rows.astype(np.float32))
    np.save(folder / "old_label.npy", labels.astype(np.int64))
    np.save(folder / "old_avg_feature.npy", (member @ rows / member.sum(1, keepdims=True).clip(1)).astype(np.float32))


def write_config(folder, method, name, **keys):
    """A config of `method` in `<folder>/<method>/configs`, over the method's own base.py; returns its path.

    method: a folder of BCT_methods, or any other name for a run without a method's keys.
    """
    configs = folder / method / "configs"
    configs.mkdir(parents=True, exist_ok=True)
    base, own = configs / "base.py", REPO / "BCT_methods" / method / "configs" / "base.py"
    if own.is_file() and not base.exists():
        base.write_text(own.read_text())
    known = load_config(own if own.is_file() else REPO / "configs" / "base.py")
    usual = {
        "rec": folder / "set.rec",
        "output": folder / name,
        "old_embedding": folder / "old_feature.npy",
        "old_embedding_label": folder / "old_label.npy",
        "old_prototype": folder / "old_avg_feature.npy",
    }
    keys = {
        **{key: str(path) for key, path in usual.items() if key in known},
        "embedding_size": WIDTH,
        "network": "tiny",
        "num_epoch": 2,
        "batch_size": 12,
        "num_workers": 0,
        "lr": 0.05,
        "margin_scale": 8.0,
        **keys,
    }
    lines = [f"config.{key} = {value!r}" for key, value in keys.items()]
    path = configs / f"{name}.py"
    path.write_text("\n".join(["from easydict import EasyDict", "config = EasyDict()", *lines]) + "\n")
    return path


def without_batch_norm():
    """A backbone whose step does not depend on how the global batch is split over ranks."""
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 16, 16), torch.nn.PReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 49, WIDTH)
    )


def train(method, path, *overrides):
    """Train the Trainer class `method`, on `without_batch_norm`; returns (backbone, class centres, extra)."""
    torch.set_num_threads(1)
    plain = type("Plain", (method,), {"build_backbone": lambda self: without_batch_norm()})
    trainer = plain(load_config(path, overrides))
    trainer.train()
    backbone = {name.removeprefix("module."): value.clone() for name, value in trainer.backbone.state_dict().items()}
    return backbone, trainer.classifier.weight.detach().clone(), dict(trainer.extra.state_dict())


def sets_of(output):
    """`[(step, ranks)]` of the complete checkpoint sets, oldest first."""
    return [(step, ranks) for step, _, ranks in map(read_done, complete_sets(output))]


def launch(method, path, *overrides, ranks=2):
    """Run the method's train.py from its own folder by torch.distributed.launch; returns its output."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.launch",
        f"--nproc_per_node={ranks}",
        f"--master_port={29500 + os.getpid() % 2000}",
        "train.py",
        str(path),
        *overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = run_session(command, cwd=REPO / "BCT_methods" / method, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
