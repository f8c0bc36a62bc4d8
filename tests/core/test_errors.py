import errno
import os
import subprocess
import sys

import pytest
import torch

from core.errors import UserError, report_errors
from recordio import RecordError


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


def test_a_bug_on_a_rank_ends_it_at_once_with_its_traceback():
    """Without waiting at exit for other ranks or threads."""
    script = (
        "import os, threading, time\nfrom core.errors import report_errors\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\nwith report_errors():\n    os.no_such_thing"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "RANK": "3"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr.startswith("[rank 3] Traceback")
    assert "no_such_thing" in done.stderr.splitlines()[-2]


def test_errors_does_not_import_torch():
    subprocess.run([sys.executable, "-c", "import sys, core.errors; assert 'torch' not in sys.modules"], check=True)
