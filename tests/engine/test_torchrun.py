"""Runs under torchrun: restarted when a rank dies, stopped by its SIGTERM, resumed by the command in the log."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from engine import checkpoint
from tests.BCT_methods.whole_runs import REPO, sets_of, write_config, write_old_features

SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {repo!r})
from BCT_methods.MixBCT.train import MixBCT

DEATHS = os.environ.get("DIES", "").split()  # the step after which rank 1 dies, in each attempt

class Disturbed(MixBCT):
    def train(self):
        self.die()
        super().train()

    def die(self):
        if self.rank == 1 and [str(self.step)] == DEATHS[int(os.environ["TORCHELASTIC_RESTART_COUNT"]) :][:1]:
            os.kill(os.getpid(), signal.SIGKILL)

    def update(self):
        super().update()
        self.die()
        if os.environ.get("SLOW"):
            time.sleep(float(os.environ["SLOW"]))
        if os.environ.get("WAITS") and self.step == 5:
            open(f"{{self.cfg.output}}/waits_{{self.rank}}", "w").close()
            while not self.stop.received:
                time.sleep(0.01)

if __name__ == "__main__":
    Disturbed.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_record_set):
    folder, labels = tmp_path_factory.mktemp("torchrun"), [i % 5 for i in range(60)]
    make_record_set(folder / "set.rec", labels)
    write_old_features(folder, labels)
    (folder / "train.py").write_text(SCRIPT.format(repo=str(REPO)))
    return folder


def start(folder, name, *launcher, keys=(), **environment):
    """torchrun on two ranks: 10 steps an epoch, 3 epochs, a checkpoint every 3 steps."""
    keys = {"batch_size": 3, "num_epoch": 3, "checkpoint_steps": 3, "frequent": 1, **dict(keys)}
    path = write_config(folder, "MixBCT", name, **keys)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={31500 + os.getpid() % 2000}",
        *launcher,
        str(folder / "train.py"),
        str(path),
    ]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=at_work(**environment)
    )


def at_work(**environment):
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **environment}


@pytest.fixture(scope="module")
def whole(folder):
    """The output of an undisturbed run."""
    process = start(folder, "whole")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    return folder / "whole"


def assert_same_end(whole, output):
    for name in ("model.pt", "softmax_fc_gpu_0.pt", "softmax_fc_gpu_1.pt"):
        first, second = checkpoint.load(whole / name), checkpoint.load(output / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name


def test_max_restarts_resumes_from_the_last_checkpoint(folder, whole):
    """The first death is before the first step, while another launch's finished run still lies in `output`."""
    output = shutil.copytree(whole, folder / "restarted")
    before, earlier = json.loads((output / "run.json").read_text()), (output / "training.log").read_text()
    process = start(folder, "restarted", "--max-restarts=2", DIES="0 8")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    log = (output / "training.log").read_text().removeprefix(earlier)
    assert re.findall(r"resumed from .*: epoch (\d), step (\d)", log) == [("0", "6")] and "Global Step: 1 " in log
    assert_same_end(whole, output)
    now = json.loads((output / "run.json").read_text())
    (launch,), (another,) = now.pop("launch"), before.pop("launch")
    assert now == before and launch.split()[:2] == [socket.gethostname(), str(process.pid)] and launch != another


def test_without_restarts_the_run_fails(folder):
    process = start(folder, "dead", DIES="8")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in printed
    assert [step for step, _ in sets_of(folder / "dead")] == [3, 6]


def test_sigterm_to_torchrun_stops_all_ranks_and_logs_how_to_resume(folder, whole):
    process = start(folder, "stopped", WAITS="1")
    deadline = time.monotonic() + 100
    while not all((folder / f"stopped/waits_{rank}").exists() for rank in range(2)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    found = re.search(r"stopped by SIGTERM at step 5; resume with: (torchrun .*)", printed)
    assert found, printed
    assert sets_of(folder / "stopped") == [(3, 2), (5, 2)]
    done = subprocess.run(shlex.split(found[1]), cwd=folder, capture_output=True, text=True, timeout=120, env=at_work())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed from {folder}/stopped/checkpoints/{5 * 6:012}/rank_0_of_2.pt" in done.stdout
    assert_same_end(whole, folder / "stopped")


@pytest.mark.gpu(2)
def test_two_gpus(folder):
    """NCCL, fused AdamW, float16 with its scaler, and a resume."""
    keys = {"optimizer": "adamw", "lr": 1e-3, "amp_dtype": "float16"}
    process = start(folder, "gpus", keys=keys)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    log = (folder / "gpus/training.log").read_text()
    assert "2 ranks on cuda" in log and "Global Step: 30 " in log and "Fp16 Grad Scale" in log
    losses = [float(value) for value in re.findall(r"Loss ([\d.]+)", log)]
    assert losses[-1] < losses[0]

    process = start(folder, "gpus", keys={**keys, "num_epoch": 4, "resume": True})
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "resumed from" in printed and "Global Step: 40 " in printed, printed


def test_ranks_stop_when_torchrun_is_killed(folder, whole):
    """By SIGUSR1, which it passes on only with --signals-to-handle and else dies of."""
    process = start(folder, "orphaned", SLOW="0.2")
    log = folder / "orphaned" / "training.log"
    wait_for(lambda: log.exists() and "Global Step: 2" in log.read_text())
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) != 0
    wait_for(lambda: "stopped by the end of torchrun at step" in log.read_text())
    step = int(re.search(r"stopped by the end of torchrun at step (\d+)", log.read_text())[1])
    assert sets_of(folder / "orphaned")[-1] == (step, 2) and step < 30


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
