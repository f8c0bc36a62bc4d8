"""Files that are there whole or not at all, whatever happens while they are written."""

import contextlib
import os
import pathlib


@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(path) as file:` a binary file that takes the name `path` once it is whole and on the disk.

    It is written under a temporary name in the same directory. If the block fails, that is removed and a file that
    was there before stays as it was. Raises OSError where it cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())     # else a crash could leave the name without its contents
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
