"""What all modules of the evaluation need of the file system: an error type, whole-or-nothing writing, content keys."""

import contextlib
import hashlib
import os
import pathlib

from core.errors import UserError


class EvalError(UserError, ValueError):
    """Something the user can put right: the message names the file, the line where there is one, and what to do."""


@contextlib.contextmanager
def publish(path):
    """Give a temporary path beside `path`; move it onto `path` when the block ends well, remove it when it does not."""
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
    """Hex digest over the contents of the files, each preceded by its size so that no two lists collide."""
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
    """What changes when a file does: size, modification time and inode change time, in nanoseconds.

    The change time is there because copying tools can restore the modification time, but not that one.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise EvalError(f"{path}: cannot be read ({error.strerror}); check -d DIR and -s SUBSET") from None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
