"""Atomic file writes, and the state files of a run, which are read without running code."""

import contextlib
import errno
import os
import pathlib
import re
import zipfile

import torch

from core.errors import UserError

# An OSError with one of these comes from damaged content (a bad offset); any other comes from the system.
_FROM_CONTENT = {None, errno.EINVAL}
# In RuntimeErrors of torch that are not about the file.
_FROM_SYSTEM = re.compile("allocate memory|out of memory|unable to mmap|unable to open|Too many open files|CUDA error")


class CheckpointError(UserError):
    """An unusable checkpoint or model file; the message names it and the next step."""


@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(path) as file:` a binary file that is renamed to `path` once it is complete and on disk.

    Until then it has a temporary name in the same directory. If the block fails, the temporary file is removed and an
    existing `path` stays as it was; a killed process leaves it behind, see `remove_leftovers`. Raises OSError.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a crash could leave the name without the contents
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(path):
    """Sync the names in a directory to disk; a no-op where directories cannot be opened (Windows)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # refused by some network file systems, which then persist the rename themselves
    finally:
        os.close(descriptor)


def remove_leftovers(directory):
    """Delete the temporary files of killed processes; nothing may be writing there now."""
    for path in pathlib.Path(directory).glob(".*.tmp"):
        path.unlink(missing_ok=True)


# --- state files ----------------------------------------------------------------------------------------------------


def save_atomically(state, path):
    """torch.save by `write_atomically`."""
    write_atomically(lambda file: torch.save(state, file), path)


def write_atomically(write, path):
    """Write a file with `write(file)`, creating its directory; CheckpointError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            write(file)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch wraps it in its own error
        if not isinstance(reason, OSError):
            raise
        raise CheckpointError(
            f"{path}: cannot be written ({reason.strerror}); earlier checkpoints are intact: "
            "free some space, then restart with --resume True"
        ) from error


def load(path, map_location="cpu", mmap=False):
    """torch.load of tensors and plain values (`weights_only`).

    Raises CheckpointError for a damaged file. System errors (no such file, no permission, network disk gone, out of
    memory) propagate, because the file may be intact.
    """
    with _damage_named(path):
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


def check_whole(path):
    """Verify the checksums of a torch.save file, which torch.load does not do; raises as `load`."""
    with _damage_named(path), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise CheckpointError(f"{path}: damaged, wrong checksum in {damaged}")


@contextlib.contextmanager
def _damage_named(path):
    """Turn all but system errors into CheckpointError: reading a damaged file may raise nearly anything."""
    try:
        yield
    except Exception as error:
        from_system = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        from_system |= isinstance(error, OSError) and error.errno not in _FROM_CONTENT
        from_system |= isinstance(error, RuntimeError) and _FROM_SYSTEM.search(str(error)) is not None
        if isinstance(error, OSError) and from_system:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        if from_system:
            raise
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__}: {reason})") from error
