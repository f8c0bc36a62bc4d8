"""Checkpoint sets: completeness, deletion, resuming, and agreement between ranks."""

import errno
import logging
import time

import pytest
import torch

from core import files
from core.distributed import rank, world_size
from engine import checkpoint
from engine.checkpoint import DAMAGED, CheckpointError, complete_sets, load_newest, save_set
from engine.monitor import log
from tests.ranks import run_ranks

CPU = torch.device("cpu")
BATCH, TOTAL = 8, 99  # images a step, steps of a whole run
RENAMED = "renamed the set to"


# --- sets ------------------------------------------------------------------------------------------------------------


def state_at(step):
    weight = torch.arange(3, dtype=torch.float64)
    return {"step": step, "images": BATCH * step, "total_steps": TOTAL, "weight": weight, "class_sharded": []}


def save_on_ranks(output, steps):
    for step in steps:
        save_set(output, state_at(step))


def write_set(output, step, ranks, done=True):
    """As saved by `ranks` ranks; done=False: killed before DONE."""
    folder = output / checkpoint.FOLDER / f"{BATCH * step:012}"
    for number in range(ranks):
        checkpoint.save_atomically(state_at(step), folder / f"rank_{number}_of_{ranks}.pt")
    if done:
        (folder / checkpoint.DONE).write_text(f"step {step} of {TOTAL} on {ranks} ranks\n")
    return folder


def steps_in(output):
    return [checkpoint.read_done(folder)[0] for folder in complete_sets(output)]


def names(output):
    return sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_set_is_its_ranks_files_and_the_last_two_are_kept(tmp_path, ranks):
    run_ranks(save_on_ranks, ranks, tmp_path, [9, 10, 1000])  # names sort as numbers
    assert names(tmp_path) == sorted(
        f"checkpoints/{images:012}/{name}"
        for images in (80, 8000)
        for name in ["DONE", *(f"rank_{number}_of_{ranks}.pt" for number in range(ranks))]
    )
    assert steps_in(tmp_path) == [10, 1000]
    assert checkpoint.read_done(complete_sets(tmp_path)[1]) == (1000, TOTAL, ranks)


def save_with_a_slow_rank(output):
    """Whether the set was complete before the second rank had written."""
    seen, save = [], checkpoint.save_atomically

    def late(state, path):
        if rank() == 1:
            while not path.with_name("rank_0_of_2.pt").exists():
                time.sleep(0.01)
            time.sleep(0.2)
            seen.append(path.with_name("DONE").exists())
        save(state, path)

    checkpoint.save_atomically = late
    save_set(output, state_at(5))
    return seen


def test_a_set_is_complete_when_all_ranks_have_written(tmp_path):
    assert run_ranks(save_with_a_slow_rank, 2, tmp_path) == [[], [False]]
    assert steps_in(tmp_path) == [5]


def test_an_incomplete_set_is_not_counted_and_not_opened(tmp_path):
    for step in (5, 10):
        write_set(tmp_path, step, 1)
    (write_set(tmp_path, 15, 1, done=False) / "rank_0_of_1.pt").write_bytes(b"never opened")
    assert steps_in(tmp_path) == [5, 10]
    assert newest(tmp_path) == (10, [])


def test_a_set_is_removed_done_first(tmp_path, monkeypatch):
    write_set(tmp_path, 5, 2)
    deleted = []
    monkeypatch.setattr(type(tmp_path), "unlink", lambda self, missing_ok: deleted.append(self.name))
    checkpoint._remove(complete_sets(tmp_path)[0])
    assert deleted[0] == "DONE" and len(deleted) == 3


# --- resuming --------------------------------------------------------------------------------------------------------


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def newest(output):
    """The step that this rank resumes from, or the error's text; and the log."""
    files.SECONDS_TO_APPEAR, seconds = 0, files.SECONDS_TO_APPEAR
    handler = Lines()
    log.addHandler(handler)
    try:
        found = load_newest(output, CPU)
    except CheckpointError as error:
        return str(error), handler.lines
    finally:
        log.removeHandler(handler)
        files.SECONDS_TO_APPEAR = seconds
    return found and found[0]["step"], handler.lines


def spoil(path):
    """Flip one bit of a tensor, which torch.load does not notice."""
    content = bytearray(path.read_bytes())
    at = content.index(torch.arange(3, dtype=torch.float64).numpy().tobytes())
    content[at + 1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_file_on_any_rank_makes_all_fall_back(tmp_path, ranks):
    folders = {step: write_set(tmp_path, step, ranks) for step in (5, 10, 15, 20, 25)}
    last = f"rank_{ranks - 1}_of_{ranks}.pt"
    (folders[25] / last).unlink()
    spoil(folders[20] / last)
    path = folders[15] / f"rank_0_of_{ranks}.pt"
    path.write_bytes(path.read_bytes()[:-30])
    damages = {25: f"{last}: no such file", 20: "wrong checksum in", 15: "not a readable checkpoint"}
    for number, (step, told) in enumerate(run_ranks(newest, ranks, tmp_path)):
        assert step == 10 and len(told) == (3 if number == 0 else 0)  # rank 0 has the log
        for line, (its_step, why) in zip(told, damages.items()):
            folder = folders[its_step]
            assert line.startswith(str(folder)) and why in line
            assert f"{RENAMED} {folder.with_name(DAMAGED + folder.name)} " in line
    assert steps_in(tmp_path) == [5, 10]
    assert len(list((tmp_path / "checkpoints").glob(f"{DAMAGED}*"))) == 3
    # From then on damaged sets do not count, neither for KEEP nor as the newest.
    for step in (15, 20):
        spoil(write_set(tmp_path, step, 1) / "rank_0_of_1.pt")
    assert newest(tmp_path)[0] == 10
    save_set(tmp_path, state_at(12))
    assert steps_in(tmp_path) == [10, 12]


@pytest.mark.parametrize("text", ["", "step 5 of 99", "\xff"])
def test_a_set_with_a_damaged_done_is_damaged(tmp_path, text):
    write_set(tmp_path, 5, 1)
    (write_set(tmp_path, 10, 1) / "DONE").write_text(text, encoding="latin-1")
    step, (line,) = newest(tmp_path)
    assert step == 5 and "000000000080/DONE: damaged, " in line and RENAMED in line


def test_a_state_in_the_wrong_directory_is_damaged(tmp_path):
    write_set(tmp_path, 5, 1)
    torch.save(state_at(6), write_set(tmp_path, 10, 1) / "rank_0_of_1.pt")
    step, (line,) = newest(tmp_path)
    assert step == 5 and "000000000080/rank_0_of_1.pt: not the state of a run after 80 images" in line


def test_if_all_sets_are_damaged_nothing_is_changed(tmp_path):
    for step in (5, 10):
        spoil(write_set(tmp_path, step, 2) / "rank_1_of_2.pt")
    before = names(tmp_path)
    for _ in range(2):  # the launcher's restart, too
        for said, told in run_ranks(newest, 2, tmp_path):
            assert "every checkpoint is damaged (" in said and "000000000080/rank_1_of_2.pt: damaged" in said
            assert not told
    assert names(tmp_path) == before


def newest_on_a_disk_that_is_away(output, error):
    if rank() == world_size() - 1:

        def fails(*_, **__):
            raise error

        torch.load = fails
    return newest(output)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
        torch.OutOfMemoryError("HIP says no"),
    ],
)
def test_system_errors_are_not_damage(tmp_path, ranks, error):
    for step in (5, 10):
        write_set(tmp_path, step, ranks)
    before = names(tmp_path)
    for said, told in run_ranks(newest_on_a_disk_that_is_away, ranks, tmp_path, error):
        folder = complete_sets(tmp_path)[-1]
        assert said.startswith(f"{folder}: cannot be read on rank {ranks - 1} ({type(error).__name__}: ")
        assert "Nothing was changed" in said and "move this directory away" in said and not told
        assert not isinstance(error, OSError) or f"rank_{ranks - 1}_of_{ranks}.pt" in said
    assert names(tmp_path) == before


def test_without_checkpoints_nothing_is_resumed(tmp_path):
    assert newest(tmp_path) == (None, [])
    write_set(tmp_path, 5, 2, done=False)
    assert newest(tmp_path) == (None, [])


def seen_by_each(output):
    """A slow network disk: the first rank does not see the newest set's marker when it lists them."""
    number, glob = rank(), type(output).glob

    def late(self, pattern):
        return [path for path in glob(self, pattern) if number == 1 or path.parts[-2:] != ("000000000080", "DONE")]

    type(output).glob = late
    return newest(output)


def test_a_set_not_yet_visible_to_all_ranks_is_kept_and_used(tmp_path):
    for step in (5, 10):
        write_set(tmp_path, step, 2)
    assert run_ranks(seen_by_each, 2, tmp_path) == [(10, []), (10, [])]
    assert steps_in(tmp_path) == [5, 10]


def test_leftovers_of_killed_processes_are_deleted(tmp_path):
    write_set(tmp_path, 5, 2)
    before = names(tmp_path)
    write_set(tmp_path, 10, 2, done=False)
    (tmp_path / ".model.pt.123.tmp").touch()
    (tmp_path / "checkpoints/000000000096").mkdir()
    (tmp_path / "checkpoints/000000000096/.rank_0_of_2.pt.123.tmp").touch()
    assert run_ranks(newest, 2, tmp_path)[0] == (5, [])
    assert names(tmp_path) == before and len(list((tmp_path / "checkpoints").iterdir())) == 1
