"""Errors that a user can mend end a script with one line instead of a traceback."""

import contextlib
import errno
import os
import sys

from recordio import RecordError


class UserError(Exception):
    """Something the user can mend. The message names the file and the key, and says what to do next."""


# What the system may refuse: the message of such an OSError, with its file, says it all.
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOENT, errno.EMFILE}


@contextlib.contextmanager
def report_errors():
    """Print one line for an error that the user can mend, and exit with 1; anything else is a bug and goes through.

    The former are a UserError, a RecordError, a file that is missing, a disk that is full or not ours to write, and too
    little GPU memory. With several ranks each says its own line, marked with its rank.
    """
    try:
        yield
    except (UserError, RecordError) as error:
        _end(f"{type(error).__name__}: {error}")
    except OSError as error:
        if error.errno not in _REFUSED and not isinstance(error, FileNotFoundError):
            raise
        _end(f"{type(error).__name__}: {error}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; scripts that do without torch need not import it here
            raise
        _end(
            f"{type(error).__name__}: {str(error).partition('. ')[0]}. "
            "Set a smaller batch_size, with gradient_acc raised to keep the global batch, or a sample_rate below 1"
        )


def _end(line):
    where = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    sys.stdout.flush()
    print(where + line, file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        os._exit(1)  # sys.exit would wait, in the process group's shutdown, for ranks that are still at work
    sys.exit(1)
