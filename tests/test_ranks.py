"""tests/ranks.py: what hangs is told where, and nothing is left running."""

import os
import select
import signal
import subprocess

import pytest

from tests import ranks


def stuck(folder):
    (folder / os.environ["RANK"]).write_text("so far")
    signal.pause()


def test_ranks_that_hang_say_where(tmp_path, monkeypatch):
    fifos = [tmp_path / "0", tmp_path / "1"]
    for fifo in fifos:
        os.mkfifo(fifo)
    # In place of the time: both have come so far.
    monkeypatch.setattr(ranks, "wait", lambda *_, timeout: [fifo.read_text() for fifo in fifos].clear())
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[0, 1\] still run .*error0:.* in stuck.*error1:.* in stuck"):
        ranks.run_ranks(stuck, 2, tmp_path)


def test_a_command_that_hangs_ends_with_those_that_it_started(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pid")
    children = []

    def communicate(process, timeout):
        children.append(os.pidfd_open(int((tmp_path / "pid").read_text())))
        raise subprocess.TimeoutExpired(process.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    with pytest.raises(subprocess.TimeoutExpired):
        ranks.run_session(["bash", "-c", "sleep 600 & echo $! > pid; wait"], cwd=tmp_path)
    assert select.select(children, [], [], 60)[0]
