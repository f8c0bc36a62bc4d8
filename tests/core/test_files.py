"""Atomic file writes."""

import os

import pytest

from core.files import atomic_write


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
