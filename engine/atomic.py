"""Files that are there whole or not at all, whatever happens while they are written."""

import contextlib
import os
import pathlib


@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(path) as file:` a binary file that takes the name `path` once it is whole and on the disk.

    It is written under a temporary name in the same directory. If the block fails, that is removed and a file that
    was there before stays as it was; a process that is killed leaves it behind, for `remove_leftovers`. Raises
    OSError where it cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())     # else a crash could leave the name without its contents
        os.replace(temporary, path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_directory(path):
    """Bring a new name to the disk, too; where directories cannot be opened (Windows) there is nothing to do."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass    # some network file systems refuse; the rename is done, and theirs to keep
    finally:
        os.close(descriptor)


def remove_leftovers(directory, pattern):
    """Delete what killed processes left of files whose names match `pattern`, a glob; none may be writing any now."""
    for path in pathlib.Path(directory).glob(f".{pattern}.*.tmp"):
        path.unlink(missing_ok=True)
