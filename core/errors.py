"""Errors that a user can mend end a script with one line instead of a traceback."""

import contextlib
import errno
import os
import sys
import traceback


class UserError(Exception):
    """Something the user can mend. The message names the file and the key, and says what to do next."""


# What the system may refuse: the message of such an OSError, with its file, says it all.
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOENT, errno.EMFILE}
_REFUSED |= {errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENOTCONN, errno.ESHUTDOWN}  # network disks


@contextlib.contextmanager
def report_errors():
    """Print one line for an error that the user can mend, and exit with 1; anything else is a bug and goes through.

    The former are a UserError, a file that is missing, a disk that is full or not ours to write, and too
    little GPU memory. With several ranks each says its own line, marked with its rank, or its traceback, and ends at
    once: at its exit Python would wait, in the process group's shutdown, for ranks that are still at work.
    """
    try:
        yield
    except Exception as error:
        line = _line(error)
        if line is None and "RANK" not in os.environ:
            raise
        sys.stdout.flush()
        where = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(where + (line or traceback.format_exc()), file=sys.stderr, flush=True)
        if "RANK" in os.environ:
            os._exit(1)
        sys.exit(1)


def _line(error):
    """What to say of an error that the user can mend; None for others."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, (UserError, FileNotFoundError)):
        return said
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return said
    if type(error).__name__ == "OutOfMemoryError":  # torch's; scripts that do without torch need not import it here
        return (
            f"{said.partition('. ')[0]}. "
            "Set a smaller batch_size, with gradient_acc raised to keep the global batch, or a sample_rate below 1"
        )
    return None
