import errno
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch

from core.errors import UserError, lost_rank, report_errors
from recordio import RecordError

REPO = pathlib.Path(__file__).resolve().parents[2]
# Of a path that is a file, a directory, too long, or a link to itself.
NO_SUCH_KIND = [
    OSError(number, os.strerror(number), "a/b")
    for number in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
]


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("a.py: key = 1; set it to 2"), "UserError: a.py: key = 1; set it to 2"),
        (RecordError("a.rec: cut"), "RecordError: a.rec: cut"),
        (FileNotFoundError("a.rec: no such file"), "FileNotFoundError: a.rec: no such file"),
        (OSError(errno.ENOSPC, "No space left on device", "log"), "OSError: [Errno 28] No space left on device: 'log'"),
        (
            PermissionError(errno.EACCES, "Permission denied", "out"),
            "PermissionError: [Errno 13] Permission denied: 'out'",
        ),
        *((error, f"{type(error).__name__}: [Errno {error.errno}] {error.strerror}: 'a/b'") for error in NO_SUCH_KIND),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ..."),
            "OutOfMemoryError: CUDA out of memory. Lower batch_size, raising gradient_acc",
        ),
    ],
)
@pytest.mark.parametrize("rank", [None, "3"])
def test_user_errors_end_with_one_line(error, line, rank, capsys, monkeypatch):
    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr("sys.exit", end)
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(Ended, match="1"), report_errors():
        raise error
    printed = capsys.readouterr().err
    assert printed.startswith(f"[rank 3] {line}" if rank else line) and printed.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.EBADF, "Bad file descriptor"), ValueError("x")])
def test_a_bug_propagates(error, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(type(error)), report_errors():
        raise error


def run(script, encoding="utf-8", **environment):
    """The script's code within `report_errors`, in a process of its own."""
    lines = "import os, signal, threading, time\nfrom core.errors import report_errors\nwith report_errors():\n    "
    inherited = {key: value for key, value in os.environ.items() if key != "RANK"}
    return subprocess.run(
        [sys.executable, "-c", lines + script],
        env={**inherited, "PYTHONIOENCODING": encoding, **environment},
        capture_output=True,
        encoding=encoding,
        timeout=60,
    )


WAITS = "threading.Thread(target=time.sleep, args=(600,)).start(); "  # at a normal exit, for that thread


def test_a_bug_on_a_rank_ends_it_at_once_with_its_traceback():
    done = run(f"{WAITS}os.no_such_thing", RANK="3")
    assert done.returncode == 1 and done.stderr.startswith("[rank 3] Traceback")
    assert "no_such_thing" in done.stderr.splitlines()[-2]


def test_ctrl_c_is_one_line():
    done = run("signal.raise_signal(signal.SIGINT)")
    assert done.returncode == -signal.SIGINT, "else a shell's loop would go on with its next command"
    assert done.stderr == "interrupted by Ctrl-C\n"
    done = run(f"{WAITS}signal.raise_signal(signal.SIGINT)", RANK="3")
    assert (done.returncode, done.stderr) == (130, "[rank 3] interrupted by Ctrl-C\n")


@pytest.mark.parametrize("encoding, printed", [("ascii", "? ? s"), ("latin-1", "? × s"), ("utf-8", "θ × s")])
def test_any_text_can_be_printed(encoding, printed):
    done = run("print('θ × s')", encoding)
    assert (done.stdout, done.stderr) == (f"{printed}\n", "")


SOURCES = [*REPO.glob("*.py"), *REPO.glob("BCT_methods/**/*.py"), *REPO.glob("tools/**/*.py")]
SCRIPTS = sorted(path for path in SOURCES if '__name__ == "__main__"' in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(REPO).as_posix())
def test_every_script_reports_its_errors_so(path):
    text = path.read_text(encoding="utf-8")
    assert "with report_errors():" in text or "(Trainer):" in text, "Trainer.main does"


def test_errors_does_not_import_torch():
    subprocess.run([sys.executable, "-c", "import sys, core.errors; assert 'torch' not in sys.modules"], check=True)


# --- a rank that is gone --------------------------------------------------------------------------------------------

LOSES = """
import os, sys
import torch
from core import distributed
from core.errors import report_errors
with report_errors():
    distributed.init_distributed()
    if distributed.rank() == 1:
        os._exit(7)
    distributed.all_reduce_(torch.ones(1))
"""


def test_a_lost_rank_is_one_line():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LOSES],
            cwd=REPO,
            env={**environment, "RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = ranks[0].communicate(timeout=120)[1].strip().splitlines()
    ranks[1].communicate(timeout=120)
    assert [rank.returncode for rank in ranks] == [1, 7]
    form = r"\[rank 0\] LostRank: no answer from another rank in all_reduce_ \(core/distributed.py:\d+\)"
    assert re.match(form, said[-1]), said
    assert "names the rank that ended first" in said[-1] and not any("Traceback" in line for line in said)


def test_other_errors_are_not_taken_for_a_lost_rank(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("timed out"), KeyError("NCCL")):
        assert lost_rank(error) is None
    monkeypatch.delenv("RANK")
    assert lost_rank(RuntimeError("Connection closed by peer")) is None
