"""Files that are whole or absent: written under a temporary name and renamed, locks that name their holder.

A temporary file `.<name>.<token>.tmp` lies beside its target and is locked by its writer, so that the next writer of
the same target can tell a killed process's leftover, which it deletes, from a file that is still being written.
"""

import contextlib
import ctypes
import errno
import glob
import os
import pathlib
import secrets
import shlex
import socket
import sys
import time

from core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SECONDS_TO_APPEAR = 10  # until a new file is visible to all machines that share the disk


@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(path) as file:` a binary file that is renamed to `path` once it is complete and on disk.

    If the block fails, the temporary file is removed and an existing `path` stays as it was. Raises OSError.
    """
    path = pathlib.Path(path)
    temporary, file = open_temporary(path)
    try:
        with file:
            yield file
            publish(file, temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_temporary(path):
    """`(temporary path, open binary file, locked)` for writing `path`; first deletes what killed writers of it left."""
    path = pathlib.Path(path)
    remove_leftovers(path.parent, path.name)
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            file = os.fdopen(os.open(temporary, _NEW, 0o666), "w+b")
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(path)) from None  # the name that the user knows
        # Between the two calls another process may have taken the file for a leftover.
        if _try_lock(file) is not False and _still_named(file, temporary):
            return temporary, file
        file.close()


def publish(file, temporary, path):
    """Give the temporary file its final name, once its contents are on disk."""
    file.flush()
    os.fsync(file.fileno())  # else a crash could leave the name without the contents
    if fcntl is None:
        file.close()  # Windows does not rename open files
    os.replace(temporary, path)
    sync_directory(pathlib.Path(path).parent)


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


def remove_leftovers(directory, name=None):
    """Delete what killed writers of `name` (None: of any file) left in a directory; living ones hold a lock."""
    for path in pathlib.Path(directory).glob(f".{glob.escape(name) if name else '*'}.*.tmp"):
        with contextlib.suppress(OSError):  # gone by now, another user's, or a link
            with os.fdopen(os.open(path, os.O_RDWR | _NOFOLLOW), "r+b") as file:
                if _try_lock(file):
                    path.unlink()


def reserve(file, size):
    """Allocate `size` bytes for an empty file, so that a full disk fails now and not in the middle.

    The file system's own call or, where it has none, a look at the free space: posix_fallocate would write zeros
    there, for hours on a large file. Raises OSError (ENOSPC).
    """
    file.truncate(size)
    if _fallocate is not None:
        if _fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
            return
        if (reason := ctypes.get_errno()) not in _CANNOT_RESERVE:
            raise OSError(reason, os.strerror(reason))
    if hasattr(os, "fstatvfs"):
        disk = os.fstatvfs(file.fileno())
        if disk.f_blocks and disk.f_bavail * disk.f_frsize < size:  # ramfs and some of FUSE tell no size
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size:,} bytes are needed")


def appears(path):
    """Whether `path` exists, or does within seconds, as on network disks."""
    return path.exists() or any(time.sleep(1) or path.exists() for _ in range(SECONDS_TO_APPEAR))


# --- locks ----------------------------------------------------------------------------------------------------------


def lock(path):
    """Lock the file `path` until the returned file is closed or this process ends; it says who holds it.

    Raises UserError if another process holds it. Where the file system has no locks, nothing is locked.
    """
    path = pathlib.Path(path)
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | _NOFOLLOW, 0o666), "r+")
    if _try_lock(file) is False:
        holder = file.read(300).strip()
        file.close()
        raise UserError(f"{path}: held by {holder or 'another process'}; wait for it or stop it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}: {shlex.join(sys.argv)}\n")
    file.flush()
    return file


_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW | getattr(os, "O_BINARY", 0)


def _try_lock(file):
    """True if the open file is locked now, False if another process has it, None where there are no locks.

    Not flock: forked data workers would keep it briefly after this process is killed.
    """
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None


def _still_named(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


# fallocate(2), by ctypes: Python has only posix_fallocate.
_CANNOT_RESERVE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EINTR}
_fallocate = None
if sys.platform == "linux":
    _fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
