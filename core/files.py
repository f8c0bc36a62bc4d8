"""Files that are there whole or not at all, and the state files of a run: written so, read without running any code."""

import contextlib
import errno
import os
import pathlib
import re
import zipfile

import torch

from core.errors import UserError

# An OSError with one of these comes from nonsense in the file (a bad offset); any other comes from the system.
_FROM_CONTENT = {None, errno.EINVAL}
# In torch's RuntimeErrors that say nothing about the file.
_FROM_SYSTEM = re.compile("allocate memory|out of memory|unable to mmap|unable to open|Too many open files|CUDA error")


class CheckpointError(UserError):
    """A checkpoint or model file that cannot be used; the message names it and the next step."""


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
            os.fsync(file.fileno())  # else a crash could leave the name without its contents
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(path):
    """Sync the names in a directory to disk; where directories cannot be opened (Windows) there is nothing to do."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse; the rename is done, and theirs to keep
    finally:
        os.close(descriptor)


def remove_leftovers(directory):
    """Delete the temporary files of killed processes; none may be writing there now."""
    for path in pathlib.Path(directory).glob(".*.tmp"):
        path.unlink(missing_ok=True)


# --- state files ----------------------------------------------------------------------------------------------------


def save_atomically(state, path):
    """torch.save by `write_atomically`."""
    write_atomically(lambda file: torch.save(state, file), path)


def write_atomically(write, path):
    """Have `write(file)` write a file of a run, in a directory made for it; CheckpointError if the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            write(file)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch raises its own error over it
        if not isinstance(reason, OSError):
            raise
        raise CheckpointError(
            f"{path}: could not be written ({reason.strerror}); earlier checkpoints are intact: "
            "make room, then start again with --resume True"
        ) from error


def load(path, map_location="cpu", mmap=False):
    """torch.load of tensors and plain values (`weights_only`).

    Raises CheckpointError for a damaged file. Errors of the system (no such file, no permission, a network disk that
    is away, out of memory) pass through, for the file may be good.
    """
    with _damage_named(path):
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


def check_whole(path):
    """Verify the checksums of a file that torch.save wrote, which torch.load does not; raises as `load`."""
    with _damage_named(path), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise CheckpointError(f"{path}: damaged, wrong checksum of its part {damaged}")


@contextlib.contextmanager
def _damage_named(path):
    """A damaged file may raise nearly anything when it is read: all but errors of the system become CheckpointError."""
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
