"""Errors that a user can mend end a script with one line instead of a traceback."""

import contextlib
import os
import sys

from recordio import RecordError


class UserError(Exception):
    """Something the user can mend. The message names the file and the key, and says what to do next."""


@contextlib.contextmanager
def report_errors():
    """Print the message of a UserError, a RecordError or a missing file and exit with 1; anything else is a bug.

    With several ranks each says its own line, marked with its rank.
    """
    try:
        yield
    except (UserError, RecordError, FileNotFoundError) as error:
        where = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        sys.stdout.flush()
        print(f"{where}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if "RANK" in os.environ:
            os._exit(1)  # sys.exit would wait, in the process group's shutdown, for ranks that are still at work
        sys.exit(1)
