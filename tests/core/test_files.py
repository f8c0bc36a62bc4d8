"""Atomic writes, leftovers of killed writers, locks, reserved space."""

import errno
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import types

import pytest

from core import files
from core.errors import UserError
from core.files import atomic_write, lock, open_temporary, remove_leftovers, reserve


def test_a_file_is_renamed_once_complete_and_synced(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.bin", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with atomic_write(str(path)) as file:
        file.write(b"whole")
        file.flush()
        assert not path.exists() and len(list(tmp_path.iterdir())) == 1
        assert not synced
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]
    assert synced[0] == 5 and len(synced) == 2  # including the file's own buffer; then the directory


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("wrong"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.bin"
    for before in (None, b"before"):
        if before:
            path.write_bytes(before)
        with pytest.raises(type(error)):
            with atomic_write(path) as file:
                file.write(b"half")
                raise error
        assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([before] if before else [])


def test_a_failed_sync_or_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")

    def fail(*_):
        raise OSError(5, "Input/output error")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
            patch.setattr(os, name, fail)
            with atomic_write(path) as file:
                file.write(b"new")
        assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


# --- other processes ------------------------------------------------------------------------------------------------


def in_another_process(function, *arguments):
    """Start `function(sender, ...)` and return the process and what it sends first."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=function, args=(sender, *arguments), daemon=True)
    process.start()
    return process, receiver.recv()


def _write_half_and_wait(sender, path):
    with atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        sender.send(os.getpid())
        signal.pause()


def test_a_writer_removes_what_a_killed_one_left_and_spares_a_living_one(tmp_path):
    path = tmp_path / "a.bin"
    (tmp_path / ".b.bin.0f0f0f0f.tmp").touch()  # another file's
    writer, _ = in_another_process(_write_half_and_wait, path)
    with atomic_write(path) as file:
        file.write(b"whole")
    assert len(list(tmp_path.glob(".a.bin.*.tmp"))) == 1
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    with atomic_write(path) as file:
        file.write(b"again")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".b.bin.0f0f0f0f.tmp", "a.bin"]
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"again"


def test_a_planted_name_is_not_written_through(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_bytes(b"keep")
    tokens = iter(["planted0", "free0000"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: next(tokens))
    (tmp_path / ".a.bin.planted0.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        open_temporary(tmp_path / "a.bin")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(OSError) as error:
        lock(tmp_path / ".lock")
    assert error.value.errno == errno.ELOOP and victim.read_bytes() == b"keep"


def test_a_file_taken_for_a_leftover_is_opened_anew(tmp_path, monkeypatch):
    """Another process deletes the new file before it is locked."""
    taken = []

    def lock_late(file):
        if not taken:
            taken.append(file.name)
            [path.unlink() for path in tmp_path.iterdir()]
        return True

    monkeypatch.setattr(files, "_try_lock", lock_late)
    temporary, file = open_temporary(tmp_path / "a.bin")
    assert taken and list(tmp_path.iterdir()) == [temporary]
    file.close()


def _hold(sender, path):
    held = lock(path)
    sender.send(os.getpid())
    signal.pause()
    held.close()


def test_a_lock_says_who_holds_it_and_ends_with_its_process(tmp_path):
    path = tmp_path / ".lock"
    holder, pid = in_another_process(_hold, path)
    with pytest.raises(UserError, match=rf"\.lock: held by process {pid} on .+: \S.*; wait for it or stop it"):
        lock(path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    lock(path).close()


# --- reserved space -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [0, errno.EOPNOTSUPP])
def test_space_is_reserved_or_at_least_there(tmp_path, monkeypatch, reason):
    """EOPNOTSUPP: the answer of NFS below 4.2, ext2 and ramfs, where nothing but the free space can be checked."""

    def fallocate(*_):
        files.ctypes.set_errno(reason)
        return -1

    if reason:
        monkeypatch.setattr(files, "_fallocate", fallocate)
    with atomic_write(tmp_path / "a.bin") as file:
        reserve(file, 1 << 20)
    status = os.stat(tmp_path / "a.bin")
    assert status.st_size == 1 << 20
    if not reason and files._fallocate is not None:
        assert status.st_blocks * 512 >= 1 << 20
    with pytest.raises(OSError) as error, atomic_write(tmp_path / "b.bin") as file:
        reserve(file, 1 << 60)
    assert error.value.errno in (errno.ENOSPC, errno.EFBIG) and [*tmp_path.iterdir()] == [tmp_path / "a.bin"]


@pytest.mark.parametrize("reason, free, expected", [(errno.EIO, 2, errno.EIO), (errno.EOPNOTSUPP, 0, errno.ENOSPC)])
def test_why_space_is_not_reserved(tmp_path, monkeypatch, reason, free, expected):
    """The disk's own refusal, whatever room there is; where it has no call for it, the room that is left."""
    room = types.SimpleNamespace(f_blocks=4, f_bavail=free, f_frsize=1 << 20)
    monkeypatch.setattr(files, "_fallocate", lambda *_: files.ctypes.set_errno(reason) or -1)
    monkeypatch.setattr(files.os, "fstatvfs", lambda _: room)
    with open(tmp_path / "a.bin", "wb") as file, pytest.raises(OSError) as error:
        reserve(file, 1 << 20)
    assert error.value.errno == expected


RESERVE = """
import errno, sys
from core import files

def outcome(name, size, also=None):
    try:
        with files.atomic_write(f"{sys.argv[1]}/{name}") as file:
            files.reserve(file, size)
            if also:
                also()
            file.write(b"1" * size)
            return "written"
    except OSError as error:
        return errno.errorcode[error.errno]

def fill():
    with open(f"{sys.argv[1]}/other", "wb") as file:
        file.write(b"1" * (4 << 20))

print(outcome("a", 1 << 20), outcome("b", 1 << 24), outcome("c", 5 << 20, fill), files._fallocate is not None)
"""


@pytest.mark.parametrize(
    "mount, expected, left",
    [
        ("mke2fs -q -t ext2 image && mount -o loop image disk", "written ENOSPC ENOSPC True", ["a", "other"]),
        ("mount -t ramfs none disk", "written written written True", ["a", "b", "c", "other"]),  # tells no size
    ],
    ids=["ext2", "ramfs"],
)
def test_disks_without_fallocate(tmp_path, mount, expected, left):
    """8 MiB of ext2, and ramfs: what fits is written at once, what does not is refused or leaves no file."""
    (tmp_path / "disk").mkdir()
    with open(tmp_path / "image", "wb") as file:
        file.truncate(8 << 20)
    enter = ["unshare", "--mount", *["--map-root-user"] * (os.geteuid() != 0), "sh", "-c"]
    script = f'{mount} || exit 77; PYTHONPATH="$1" "$2" -c "$3" disk && ls disk'
    words = ["sh", str(pathlib.Path(files.__file__).parents[1]), sys.executable, RESERVE]
    try:
        done = subprocess.run([*enter, script, *words], cwd=tmp_path, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"no namespaces here: {error}")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"cannot be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    told, *names = done.stdout.splitlines()
    assert told == expected and [name for name in names if name != "lost+found"] == left
