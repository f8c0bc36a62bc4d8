"""State files: whole or absent, damaged ones named, no code run."""

import os
import pickle
import re
import resource

import pytest
import torch

from core.state_file import CheckpointError, load, save_atomically


class Unsavable:
    def __reduce__(self):
        raise RuntimeError("an error of its own")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save_atomically({"a": 1}, path)

    def disk_full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(CheckpointError, match="model.pt: cannot be written .No space left"):
        save_atomically({"a": 2}, path)
    assert load(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("values", [10, 10**6])  # fewer than Python's buffer takes, and more: torch fails otherwise
def test_a_file_size_limit_is_named(tmp_path, values):
    path, limits = tmp_path / "model.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="model.pt: cannot be written .File too large"):
            save_atomically({"a": torch.zeros(values)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_an_unpicklable_state_is_not_reported_as_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="of its own"):
        save_atomically(Unsavable(), tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "model.pt"
    save_atomically({"a": torch.arange(100)}, path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="model.pt: not a readable checkpoint"):
            load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt")


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Code(torch.nn.Module):
    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "TorchScript", "plain pickle"])
def test_a_file_runs_no_code_and_nobody_is_told_to_let_it(tmp_path, form):
    """torch's own messages name ways to load such files all the same."""
    path, content = tmp_path / "model.pt", {"a": Harmful(tmp_path / "ran")}
    if form == "TorchScript":
        torch.jit.script(Code()).save(path)
    elif form == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match="model.pt: not a readable checkpoint") as caught:
        load(path)
    assert not (tmp_path / "ran").exists()
    assert not re.search("weights.only|trust|globals", str(caught.value), re.IGNORECASE)
