"""A signal to one rank stops all of them at the same step; the resume command in the log works."""

import os
import signal
import sys

import pytest
import torch

from core.distributed import rank
from engine.stop import StopRequest, resume_command
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest(CPU) as stop:
        assert stop.agreed() is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # an impatient scheduler
        assert stop.agreed() == stop.agreed() == signal.Signals(number).name
    assert signal.getsignal(number) is before


def steps_until_stop(stopped_rank, at):
    with StopRequest(CPU) as stop:
        for step in range(100):
            if (rank(), step) == (stopped_rank, at):
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.agreed():
                return step


@pytest.mark.parametrize("stopped_rank", [0, 2])
def test_all_ranks_stop_at_the_same_step(stopped_rank):
    assert run_ranks(steps_until_stop, 3, stopped_rank, 5) == [5, 5, 5]


@pytest.mark.parametrize(
    "words, environment, command",
    [
        (["train.py", "configs/a b.py"], {}, "python train.py 'configs/a b.py' --resume True"),
        (
            ["train.py", "a.py", "--lr", "0.1"],
            {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"},
            "torchrun --nproc_per_node=8 train.py a.py --lr 0.1 --resume True",
        ),
        (
            ["train.py", "--local-rank=1", "a.py"],
            {"RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"},
            "torchrun --nproc_per_node=8 --nnodes=2 train.py a.py --resume True",
        ),
        (["train.py", "a.py", "--resume", "True"], {}, "python train.py a.py --resume True"),
        (["train.py", "a.py", "--resume=False", "--lr=1"], {}, "python train.py a.py --lr=1 --resume True"),
    ],
)
def test_the_resume_command(words, environment, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", words)
    for key in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert resume_command() == command
