"""Errors that a user can fix end a script with one line instead of a traceback."""

import contextlib
import errno
import os
import sys
import traceback


class UserError(Exception):
    """An error that the user can fix. The message names the file, the key and the next step."""


# Refused by the system: the message of such an OSError, with its file, says it all.
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOENT, errno.EMFILE}
_REFUSED |= {errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENOTCONN, errno.ESHUTDOWN}  # network disks


@contextlib.contextmanager
def report_errors():
    """Print one line for an error that the user can fix, and exit with 1; anything else is a bug and propagates.

    User errors are UserError, a missing file, a full or read-only disk, and too little GPU memory. Under a launcher
    each rank prints its line or traceback, prefixed with its rank, and exits at once: Python's normal exit would wait,
    in the shutdown of the process group, for ranks that are still working.
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
    """The line for an error that the user can fix; None for others."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, (UserError, FileNotFoundError)):
        return said
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return said
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: scripts without torch need not import it
        return (
            f"{said.partition('. ')[0]}. "
            "Lower batch_size, raising gradient_acc to keep the global batch, or set sample_rate below 1"
        )
    return None
