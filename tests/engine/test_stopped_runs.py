"""A signal at an awkward moment: the run stops after a whole step, with a checkpoint, and can be resumed."""

import os
import pickle
import signal
import threading

import cv2
import numpy as np
import pytest
import torch

from core.config import load_config
from tests.BCT_methods.whole_runs import sets_of
from tests.conftest import draw_image
from tests.engine.test_trainer import Plain, assert_same, config, rec, run  # noqa: F401

WHOLE = {"num_epoch": 3, "checkpoint_steps": 4, "val_targets": ["pairs"], "verbose": 4}  # 6 steps an epoch


@pytest.fixture
def path(tmp_path, rec):  # noqa: F811
    random = np.random.default_rng(0)
    images = [cv2.imencode(".png", draw_image(random))[1].tobytes() for _ in range(6)]
    (tmp_path / "pairs.bin").write_bytes(pickle.dumps((images, [True, False, True])))
    return config(tmp_path, rec, **WHOLE)


def signalled(where, after):
    """A Trainer that gets SIGTERM, twice, within its method `where`, when `after` steps are done."""

    def method(self, *args):
        result = getattr(Plain, where)(self, *args)
        if self.step == after:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    return type("Signalled", (Plain,), {where: method})


@pytest.mark.parametrize(
    "where, after, sets",
    [
        ("verify", 8, [6, 8]),
        ("begin_epoch", 0, [1]),
        ("begin_epoch", 12, [12, 13]),
        ("losses", 5, [4, 6]),  # stopped at the end of an epoch
        ("save_checkpoint", 8, [8, 9]),
        ("save_models", 6, [6, 7]),
    ],
)
def test_a_signal_stops_after_a_whole_step_with_a_checkpoint(where, after, sets, path, tmp_path):
    signalled(where, after)(load_config(path)).train()
    assert sets_of(tmp_path / "run") == [(step, 1) for step in sets]
    log = (tmp_path / "run/training.log").read_text()
    assert log.count("stopped by") == log.count(f"stopped by SIGTERM at step {sets[-1]}; resume with: python ") == 1
    stopped = run(path, "--resume", "True")
    whole = run(path, "--output", str(tmp_path / "whole"))
    assert_same(whole[0], stopped[0], 0)
    assert torch.equal(whole[1], stopped[1])


@pytest.mark.parametrize("where", ["update", "verify", "save_models", "save_checkpoint"])
def test_a_signal_at_the_last_step_leaves_a_finished_run(where, path, tmp_path):
    signalled(where, 18)(load_config(path)).train()
    log = (tmp_path / "run/training.log").read_text()
    assert "Global Step: 18 " in log and "stopped by" not in log
    assert sets_of(tmp_path / "run") == [(16, 1), (18, 1)]
    run(path, "--resume", "True")  # has nothing left to do
    assert sets_of(tmp_path / "run") == [(16, 1), (18, 1)]


def test_a_run_in_a_thread_ignores_signals(path, tmp_path):
    handler, failed = signal.getsignal(signal.SIGTERM), []

    def train():
        try:
            run(path)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not failed and signal.getsignal(signal.SIGTERM) is handler
    assert sets_of(tmp_path / "run") == [(16, 1), (18, 1)]
