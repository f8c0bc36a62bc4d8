import resource

import pytest
import torch

from engine import checkpoint
from engine.checkpoint import CheckpointError


class Unsavable:
    def __reduce__(self):
        raise RuntimeError("an error of its own")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    checkpoint.save_atomically({"a": 1}, path)

    def disk_full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(CheckpointError, match="model.pt: could not be written .No space left"):
        checkpoint.save_atomically({"a": 2}, path)
    assert checkpoint.load(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("values", [10, 10**6])     # fewer than Python's buffer takes, and more: torch fails otherwise
def test_a_file_system_that_takes_no_more_is_named(tmp_path, values):
    path, limits = tmp_path / "model.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="model.pt: could not be written .File too large"):
            checkpoint.save_atomically({"a": torch.zeros(values)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved_is_no_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="of its own"):
        checkpoint.save_atomically(Unsavable(), tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "model.pt"
    checkpoint.save_atomically({"a": torch.arange(100)}, path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="model.pt: not a readable checkpoint"):
            checkpoint.load(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none.pt")
