"""A signal to one rank stops all of them at the same step; the resume command in the log works."""

import os
import signal
import sys

import pytest
import torch

from core.distributed import rank
from engine.monitor import init_logging
from engine.stop import StopRequest, resume_command, warn_of_static_rendezvous
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_remembered_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest(CPU) as stop:
        assert stop.agreed() is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # an impatient scheduler
        assert stop.agreed() == stop.agreed() == signal.Signals(number).name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_ignored_at_the_start_stays_ignored(number):
    """As under nohup, or in the background of a script."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest(CPU) as stop:
            os.kill(os.getpid(), number)
            assert stop.agreed() is None
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_second_ctrl_c_ends_at_once_and_a_forwarded_one_does_not(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("engine.stop.time.monotonic", lambda: now[0])
    with StopRequest(CPU) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.1  # the same press, passed on by torchrun
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed() == "SIGINT"
        now[0] += 3
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("launched", [True, False])
def test_without_its_launcher_a_rank_stops_one_started_by_hand_goes_on(launched, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    with StopRequest(CPU) as stop:
        assert stop.agreed() is None
        monkeypatch.setattr("engine.stop.os.getppid", lambda: -1)
        assert stop.agreed() == ("the end of torchrun" if launched else None)


@pytest.mark.parametrize("launcher, told", [("--node_rank=0 --max-restarts=3", 1), ("--rdzv_backend=c10d", 0)])
def test_a_static_rendezvous_with_restarts_is_warned_of(launcher, told, monkeypatch, capsys):
    init_logging(True)
    for key, value in (("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 2), ("TORCHELASTIC_MAX_RESTARTS", 3)):
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr("engine.stop.pathlib.Path.read_bytes", lambda _: launcher.replace(" ", "\0").encode())
    warn_of_static_rendezvous()
    assert capsys.readouterr().out.count("can hang with a static rendezvous; start it with --rdzv_backend=c10d") == told
    for key, value in (("LOCAL_WORLD_SIZE", 4), ("TORCHELASTIC_MAX_RESTARTS", 0)):
        monkeypatch.setenv(key, str(value))
        warn_of_static_rendezvous()
        assert not capsys.readouterr().out
        monkeypatch.setenv(key, "2")


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
            "start it as before on every machine, with --resume True",
        ),
        (["train.py", "a.py", "--resume", "True"], {}, "python train.py a.py --resume True"),
        (["train.py", "a.py", "--resume", "--lr", "1"], {}, "python train.py a.py --lr 1 --resume True"),
        (["train.py", "a.py", "--lr", "1", "--resume"], {}, "python train.py a.py --lr 1 --resume True"),
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
