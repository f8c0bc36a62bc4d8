"""File helpers of the evaluation: its error type, writing, content hashes."""

import contextlib
import errno
import hashlib
import os
import pathlib

from core.errors import UserError
from core.files import atomic_write, open_temporary


class EvalError(UserError, ValueError):
    """An error that the user can fix; the message names the file, the line if any, and the next step."""


@contextlib.contextmanager
def writing(path):
    """`core.files.atomic_write(path)` in a directory that is made if absent; EvalError if that fails."""
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            yield file
    except OSError as error:
        raise _cannot_be_written(path, error) from None


def check_writable(path):
    """EvalError if `path` could not be written: asked before hours of work. Nothing is left behind."""
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary, file = open_temporary(next(there for there in path.parents if there.exists()) / path.name)
        temporary.unlink()
        file.close()
    except OSError as error:
        raise _cannot_be_written(path, error) from None


def _cannot_be_written(path, error):
    return EvalError(f"{path}: cannot be written ({error.strerror or error}); make room or choose another place")


def sha256_of(paths):
    """Hex digest of the files' contents, each preceded by its size so that different lists cannot collide."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(f"{os.fstat(file.fileno()).st_size}\n".encode())
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise EvalError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return digest.hexdigest()


def stamp(path):
    """A file's size, modification time and inode change time (ns), to detect changes.

    Copying tools can restore the modification time, but not the change time.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise EvalError(f"{path}: cannot be read ({error.strerror}); check -d DIR and -s SUBSET") from None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
