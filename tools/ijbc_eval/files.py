"""File helpers of the evaluation: its error type, atomic writing, content hashes."""

import contextlib
import hashlib
import os
import pathlib

from core.errors import UserError


class EvalError(UserError, ValueError):
    """An error that the user can fix; the message names the file, the line if any, and the next step."""


@contextlib.contextmanager
def publish(path):
    """Yield a temporary path beside `path`; on success rename it to `path`, on an error remove it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last, because np.save and matplotlib choose the format by it.
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
