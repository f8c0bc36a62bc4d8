"""State files (torch.save): written whole or not at all, read without running code, checked for damage."""

import contextlib
import errno
import re
import warnings
import zipfile

import torch

from core.errors import UserError
from core.files import atomic_write

# An OSError with one of these comes from damaged content (a bad offset); any other comes from the system.
_FROM_CONTENT = {None, errno.EINVAL}
# In RuntimeErrors of torch that are not about the file.
_FROM_SYSTEM = re.compile("allocate memory|out of memory|unable to mmap|unable to open|Too many open files|CUDA error")


class CheckpointError(UserError):
    """An unusable checkpoint or model file; the message names it and the next step."""


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
    with _damage_named(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about the kind of file; what is wrong with it is said here
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
        reason = "{}: {}".format(type(error).__name__, str(error).partition("\n")[0])
        if re.search("weights.only", str(error), re.IGNORECASE):  # torch's advice is to let the file run code
            reason = "damaged, or with objects other than tensors and plain values"
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from error
