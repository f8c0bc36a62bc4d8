"""One line for the user: a warning, or an error that can be fixed, which ends a script instead of a traceback."""

import contextlib
import errno
import logging
import os
import pathlib
import re
import signal
import sys
import traceback


def warn(form, *words):
    """Log a warning that is the same on all ranks, once."""
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("bct").warning(form, *words)


class UserError(Exception):
    """An error that the user can fix. The message names the file, the key and the next step."""


class LostRank(UserError):
    """Another rank is gone, and with it the answer to a collective."""


# Refused by the system: the message of such an OSError, with its file, says it all.
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOENT, errno.EMFILE}
_REFUSED |= {errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENOTCONN, errno.ESHUTDOWN}  # network disks
_REFUSED |= {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}  # not that kind of path


@contextlib.contextmanager
def report_errors():
    """Print one line for an error that the user can fix, and exit with 1; anything else is a bug and propagates.

    User errors are UserError, a path or disk that the system refuses, and too little GPU memory. Ctrl-C is one line,
    too. Under a launcher each rank prints its line or traceback, prefixed with its rank, and exits at once: Python's
    normal exit would wait, in the shutdown of the process group, for ranks that are still working.

    From here on stdout takes any text: where it is not UTF-8, a letter that it lacks is printed as "?".
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except KeyboardInterrupt:
        _print("interrupted by Ctrl-C")
        if "RANK" in os.environ:
            os._exit(128 + signal.SIGINT)
        sys.excepthook = lambda *_: None  # no traceback; Python itself then ends by the signal, and with it shell loops
        raise
    except Exception as error:
        line = _line(error)
        if line is None and "RANK" not in os.environ:
            raise
        _print(line or traceback.format_exc())
        if "RANK" in os.environ:
            os._exit(1)
        sys.exit(1)


def _print(text):
    sys.stdout.flush()
    where = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    print(where + text, file=sys.stderr, flush=True)


def _line(error):
    """The line for an error that the user can fix; None for others."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, (UserError, FileNotFoundError)):
        return said
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return said
    if lost := lost_rank(error):
        return f"LostRank: {lost}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: scripts without torch need not import it
        return (
            f"{said.partition('. ')[0]}. "
            "Lower batch_size, raising gradient_acc to keep the global batch, or set sample_rate below 1"
        )
    return None


# What gloo, NCCL and torch's store say of a rank that does not answer.
_NO_ANSWER = re.compile("gloo|NCCL|(closed|reset) by (remote )?peer|[Tt]imed out|[Tt]imeout|Broken pipe|recvValue")
_REPO = pathlib.Path(__file__).resolve().parents[1]


def lost_rank(error):
    """The line for a collective that failed because another rank is gone; None for other errors."""
    by_kind = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    if "RANK" not in os.environ or not (by_kind or type(error) is RuntimeError and _NO_ANSWER.search(str(error))):
        return None
    frames = [(frame, pathlib.Path(frame.filename)) for frame in traceback.extract_tb(error.__traceback__)]
    own = [(frame, path.relative_to(_REPO)) for frame, path in frames if path.parent.parent in (_REPO, _REPO / "tools")]
    where = ", in ".join(f"{frame.name} ({path}:{frame.lineno})" for frame, path in own[:-3:-1])
    reason = str(error).strip().partition("\n")[0][:200]
    return (
        f"no answer from another rank in {where or 'a collective'} ({reason}); the launcher's log on each machine "
        "names the rank that ended first, and its error is the cause. Then start again, training with --resume True"
    )
