"""Every trainer on a pretended CUDA (tests/pretend_cuda.py): whole runs, and where the host waits for the device.

Trainers are found by their files: a new method is rehearsed without being named here.
"""

import importlib
import pickle
import shutil
import signal
import warnings

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist

from core.config import load_config
from core.distributed import rank
from engine.trainer import Trainer
from tests.BCT_methods.whole_runs import METHODS, REPO, WIDTH, write_old_features
from tests.pretend_cuda import pretend_cuda
from tests.pretend_tensor import DeviceTensor
from tests.ranks import run_ranks

OLD_TRAINERS = sorted(path.stem for path in REPO.glob("train_old_*.py"))
CLASSES, GLOBAL_BATCH, STEPS = 12, 8, 3  # STEPS an epoch
STOPPED_AFTER = 1  # steps of rank 0; several ranks end one later

# Where the host may wait: anywhere within these functions of the repo, each of them called once for many steps …
WAITS_WITHIN = {
    "engine/trainer.py:__init__",
    "engine/trainer.py:resume",
    "engine/trainer.py:save_checkpoint",
    "engine/trainer.py:save_models",
    "engine/trainer.py:verify",
    "train_old_softmax.py:save_models",
    "engine/monitor.py:line",
    *(f"BCT_methods/{method}/train.py:{name}" for method in METHODS for name in ("begin_epoch", "resume")),
}
# … and in this one itself, before the first step: whether a launcher has restarted the ranks.
WAITS_AT = {"engine/trainer.py:train"}


def forbidden(waits):
    """The places that may not wait, as text with their counts."""
    return [
        f"{count} x {place.what}, line {place.line} of {' < '.join(place.stack)}"
        for place, count in waits.items()
        if not WAITS_WITHIN & set(place.stack) and place.stack[0] not in WAITS_AT
    ]


# --- The pretended device itself -------------------------------------------------------------------------------------


def test_tensors_of_two_devices_do_not_go_together():
    with pretend_cuda():
        on_device = torch.ones(3, device="cuda")
        assert on_device.is_cuda and (on_device * 2).device == torch.device("cuda:0") and (on_device + 1).sum() == 6
        with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
            on_device + torch.ones(3)
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            on_device.numpy()
        assert on_device.cpu().numpy().tolist() == [1, 1, 1]
    assert not torch.cuda.is_available() or torch.cuda.get_device_name()
    assert torch.ones(3).device.type == "cpu"


def test_waits_are_noted_with_the_place_and_others_are_not():
    with pretend_cuda() as watch:
        values = torch.arange(4.0).pin_memory().to("cuda", non_blocking=True)
        values.mul_(2).softmax(0)
        assert not watch.waits
        for wait in (lambda: values.sum().item(), lambda: values[values > 1], lambda: torch.ones(2).to("cuda")):
            watch.waits.clear()
            wait()
            (place,) = watch.waits
            assert place.stack[0] == "tests/test_cuda_rehearsal.py:<lambda>" and place.line
        assert forbidden(watch.waits)


def test_copies_are_late():
    with pretend_cuda() as watch:
        values = torch.ones(3, device="cuda")
        copied, event = values.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record()
        assert 1 not in copied.tolist()
        values.add_(1)
        event.synchronize()
        assert copied.tolist() == [1, 1, 1] and not watch.waits
        event.record()
        event.synchronize()  # nothing has been launched meanwhile
        assert [place.what for place in watch.waits] == ["event of the latest operation"]

        pinned = torch.ones(3).pin_memory()
        pinned.to("cuda", non_blocking=True)
        pinned.zero_()
        with pytest.raises(AssertionError, match="changed before its copy"):
            values.sum().item()


def collective_of_a_cpu_tensor():
    with pretend_cuda():
        on_device = torch.ones(2, device="cuda")
        dist.all_reduce(on_device)
        with pytest.raises(RuntimeError, match="device type cpu"):
            dist.all_reduce(torch.ones(2))
        return on_device.cpu()


def test_collectives_take_device_tensors_alone():
    assert [result.tolist() for result in run_ranks(collective_of_a_cpu_tensor, 2)] == [[2, 2], [2, 2]]


# --- Whole runs ------------------------------------------------------------------------------------------------------


def trainer_of(name):
    """`(the Trainer class, its base config)` of a method, or of a script of the repo root."""
    is_method = name in METHODS
    module = importlib.import_module(f"BCT_methods.{name}.train" if is_method else name)
    (kind,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Trainer) and value.__module__ == module.__name__
    )
    return kind, REPO / (f"BCT_methods/{name}/configs/base.py" if is_method else "configs/base.py")


def config(name, folder, ranks, **keys):
    kind, base = trainer_of(name)
    cfg = load_config(base)
    usual = {
        "rec": "synthetic",
        "rec_val": str(folder),
        "val_targets": ["pairs"],
        "num_classes": CLASSES,
        "num_image": GLOBAL_BATCH * STEPS,
        "batch_size": GLOBAL_BATCH // ranks,
        "num_workers": 0,
        "network": "tiny",
        "embedding_size": WIDTH,
        "num_epoch": 2,
        "frequent": 2,
        "lr": 0.05,
        "margin_scale": 16.0,
        "output": str(folder / "whole"),
        "old_embedding": str(folder / "old_feature.npy"),
        "old_embedding_label": str(folder / "old_label.npy"),
        "old_prototype": str(folder / "old_avg_feature.npy"),
        "queue_size": 2 * GLOBAL_BATCH,
        "compat_start_epoch": 0,
        "refine_epochs": [1],
    }
    cfg.update({key: value for key, value in usual.items() if key in cfg})
    cfg.update(keys)
    return kind, cfg


@pytest.fixture
def folder(tmp_path):
    write_old_features(tmp_path, np.arange(GLOBAL_BATCH * STEPS) % CLASSES)
    images = [cv2.imencode(".png", np.full((112, 112, 3), value, np.uint8))[1].tobytes() for value in range(0, 200, 50)]
    (tmp_path / "pairs.bin").write_bytes(pickle.dumps((images, [True, False])))
    return tmp_path


def end_of(run):
    """What a run has come to on this rank, as CPU tensors."""
    modules = {"backbone": run.backbone, "classifier": run.classifier, "extra": run.extra}
    state = {f"{part}.{name}": value for part, module in modules.items() for name, value in module.state_dict().items()}
    assert all(isinstance(value, DeviceTensor) for value in state.values())
    return {name: value.inner.clone() for name, value in state.items()}


def rehearse(name, folder, ranks, keys):
    """A whole run, and one that is stopped and resumed: both ends, the first step's terms, forbidden waits."""
    warnings.filterwarnings("error", category=FutureWarning)  # deprecated names: a line on each rank
    kind, cfg = config(name, folder, ranks, **keys)

    class Stopped(kind):
        def update(self):
            super().update()
            if self.step == STOPPED_AFTER and rank() == 0:
                self.stop.received = signal.SIGTERM

    with pretend_cuda() as watch:
        whole = kind(cfg)
        whole.train()
        cfg.output = str(folder / "stopped")
        stopped = Stopped(cfg)
        stopped.train()
        assert STOPPED_AFTER <= stopped.step < whole.steps_per_epoch
        cfg.resume = True
        resumed = kind(cfg)
        resumed.train()
        assert resumed.step == whole.step == whole.total_steps and whole.device.type == "cuda"
        ends = end_of(whole), end_of(resumed)
    return [*ends, whole.monitor.recent[0][1], forbidden(watch.waits)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", [*OLD_TRAINERS, *METHODS])
def test_a_whole_run_a_stop_and_its_resume(name, ranks, folder):
    results = run_ranks(rehearse, ranks, name, folder, ranks, {})
    for whole, resumed, _, waits in results:
        assert not waits, "\n".join(waits)
        for key, value in whole.items():
            assert value.dtype.is_floating_point is False or value.isfinite().all(), key
            assert torch.equal(resumed[key], value), key
    saved = torch.load(folder / "whole/model.pt", weights_only=True)
    for key, value in saved.items():
        key = f"backbone.{key}" if ranks == 1 else f"backbone.module.{key}"
        assert torch.equal(value, results[0][0][key]), key
        if "running" not in key:
            assert torch.equal(value, results[-1][0][key]), key


@pytest.mark.parametrize("amp_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_optimisers_and_precisions(optimizer, amp_dtype, folder):
    """The first step's terms are nearly those of the CPU."""
    keys = {"optimizer": optimizer, "amp_dtype": amp_dtype, "lr": 0.01}
    results = run_ranks(rehearse, 2, "AdvBCT", folder, 2, keys)
    shutil.rmtree(folder / "whole")
    expected = run_ranks(first_terms, 2, "AdvBCT", folder, 2, keys)
    for (whole, resumed, terms, waits), on_cpu in zip(results, expected):
        assert not waits, "\n".join(waits)
        assert terms == pytest.approx(on_cpu, rel=0.03, abs=1e-3)
        for key, value in whole.items():
            assert torch.equal(resumed[key], value), key


def first_terms(name, folder, ranks, keys):
    kind, cfg = config(name, folder, ranks, **keys)
    run = kind(cfg)
    run.train()
    return run.monitor.recent[0][1]
