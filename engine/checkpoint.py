"""A file with the state of a run, or weights alone: written whole or not at all, read without running any code."""

import errno
import pathlib
import re
import zipfile

import torch

from engine.atomic import atomic_write
from engine.errors import UserError

# What reading a damaged file may raise as an OSError: an offset in it that makes no sense. Any other is the system's.
_BY_CONTENT = {None, errno.EINVAL}
# In the messages of torch's RuntimeErrors that say nothing about the file.
_BY_SYSTEM = re.compile("allocate memory|out of memory|unable to mmap|unable to open|Too many open files|CUDA error")


class CheckpointError(UserError):
    """A checkpoint or model file that cannot be used; the message names it and says what to do."""


def checkpoint_path(output, step, rank, world_size):
    return pathlib.Path(output) / f"checkpoint_step_{step}_gpu_{rank}_of_{world_size}.pt"


def save_atomically(state, path):
    """torch.save to a temporary name beside `path`, synced to disk, then renamed: a reader sees all of it or none."""
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__     # torch puts an error of its own over it
        if not isinstance(reason, OSError):
            raise
        raise CheckpointError(
            f"{path}: could not be written ({reason.strerror}); earlier checkpoints are intact: "
            "make room, then go on with --resume True"
        ) from error


def load(path, map_location="cpu", mmap=False):
    """torch.load of tensors and plain values alone (`weights_only`).

    Raises CheckpointError, naming the file, for one that is damaged; what the system refuses (a missing file, another
    user's, a network disk that is away, too little memory) goes through as it is, for then the file may be a good one.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:
        raise _as_damage(path, error) from error


def check_whole(path):
    """Hold a file that torch.save wrote against its checksums, which torch.load does not; raises as `load`."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        raise _as_damage(path, error) from error
    if damaged:
        raise CheckpointError(f"{path}: damaged, the checksum of its part {damaged} is wrong")


def _as_damage(path, error):
    """The CheckpointError for what reading a file raised, which of a damaged one is nearly anything.

    Re-raises what says nothing about the content.
    """
    of_system = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    of_system |= isinstance(error, OSError) and error.errno not in _BY_CONTENT
    of_system |= isinstance(error, RuntimeError) and _BY_SYSTEM.search(str(error)) is not None
    if of_system:
        if isinstance(error, OSError) and error.filename is None:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise error
    reason = str(error).partition("\n")[0]
    return CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__}: {reason})")
