"""Sets of checkpoints: which count, which are kept, which one a run goes on from, and what all ranks agree on."""

import errno
import multiprocessing

import pytest
import torch

from engine import checkpoint, checkpoint_sets
from engine.checkpoint import CheckpointError
from engine.checkpoint_sets import DAMAGED, claim, clear_leftovers, load_newest, start_afresh
from engine.distributed import rank
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def save_set(output, step, ranks, world_size):
    for number in ranks:
        checkpoint.save_atomically({"step": step}, checkpoint.checkpoint_path(output, step, number, world_size))


def test_only_whole_sets_count(tmp_path):
    save_set(tmp_path, 5, [0, 1], 2)
    save_set(tmp_path, 10, [0, 1, 2], 3)
    save_set(tmp_path, 15, [1], 2)
    assert checkpoint_sets.complete_sets(tmp_path) == [(5, 2), (10, 3)]


def test_the_last_two_whole_sets_are_kept(tmp_path):
    for step in (5, 10, 15):
        save_set(tmp_path, step, [0, 1], 2)
    save_set(tmp_path, 20, [0], 2)
    checkpoint_sets.remove_old(tmp_path, 0)
    checkpoint_sets.remove_old(tmp_path, 1)      # to this rank, the set of step 5 is no longer complete
    assert not list(tmp_path.glob("*step_5_*"))
    assert checkpoint_sets.complete_sets(tmp_path) == [(10, 2), (15, 2)]
    assert checkpoint.checkpoint_path(tmp_path, 20, 0, 2).exists()


# --- going on --------------------------------------------------------------------------------------------------------


def newest(output, ranks):
    """The step that this rank goes on from, and what rank 0 is told; an error's text."""
    told = []
    try:
        found = load_newest(output, rank(), ranks, CPU, lambda *words: told.append(words[0] % words[1:]))
    except CheckpointError as error:
        return str(error), told
    return found and found[0]["step"], told


def names(folder):
    return sorted(path.name for path in folder.glob("*checkpoint_step_*"))


def spoil(path):
    """One bit of a tensor: torch.load would not notice."""
    content = bytearray(path.read_bytes())
    at = content.index(torch.arange(3, dtype=torch.float64).numpy().tobytes())
    content[at + 1] ^= 1
    path.write_bytes(content)


def save_whole(output, step, ranks):
    for number in range(ranks):
        state = {"step": step, "total_steps": 99, "weight": torch.arange(3, dtype=torch.float64)}
        checkpoint.save_atomically(state, checkpoint.checkpoint_path(output, step, number, ranks))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_file_of_any_rank_makes_all_go_back(tmp_path, ranks):
    for step in (5, 10, 15, 20):
        save_whole(tmp_path, step, ranks)
    spoil(checkpoint.checkpoint_path(tmp_path, 20, ranks - 1, ranks))
    path = checkpoint.checkpoint_path(tmp_path, 15, 0, ranks)
    path.write_bytes(path.read_bytes()[:-30])
    for number, (step, told) in enumerate(run_ranks(newest, ranks, tmp_path, ranks)):
        assert step == 10 and len(told) == (2 if number == 0 else 0)    # rank 0 has the log
        for line, its_step, why in zip(told, (20, 15), ("the checksum of its part", "not a readable checkpoint")):
            assert f"checkpoint_step_{its_step}_gpu_" in line and why in line
            assert f"going back to the set before that of step {its_step}, whose files are now damaged_*" in line
    assert names(tmp_path) == sorted(
        f"{DAMAGED if step > 10 else ''}checkpoint_step_{step}_gpu_{number}_of_{ranks}.pt"
        for step in (5, 10, 15, 20) for number in range(ranks)
    )


def test_where_none_is_whole_nothing_is_renamed_and_nothing_begins_anew(tmp_path):
    for step in (5, 10):
        save_whole(tmp_path, step, 2)
        spoil(checkpoint.checkpoint_path(tmp_path, step, 1, 2))
    before = names(tmp_path)
    for attempt in range(2):    # the launcher's restart, too
        for said, told in run_ranks(newest, 2, tmp_path, 2):
            assert "none of its checkpoints is whole (" in said and "checkpoint_step_10_gpu_1_of_2.pt: damaged" in said
            assert not told
    assert names(tmp_path) == before


def newest_on_a_disk_that_is_away(output, ranks, error):
    if rank() == ranks - 1:
        def fails(*_, **__):
            raise error
        torch.load = fails
    return newest(output, ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("error", [
    OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
])
def test_what_the_system_refuses_is_no_damage(tmp_path, ranks, error):
    for step in (5, 10):
        save_whole(tmp_path, step, ranks)
    before = names(tmp_path)
    for said, told in run_ranks(newest_on_a_disk_that_is_away, ranks, tmp_path, ranks, error):
        path = tmp_path / f"checkpoint_step_10_gpu_{ranks - 1}_of_{ranks}.pt"
        assert said.startswith(f"{path}: cannot be read on rank {ranks - 1} ({type(error).__name__}: ")
        assert "Nothing was changed" in said and "move checkpoint_step_10_* away" in said and not told
    assert names(tmp_path) == before


def test_without_any_there_is_nothing_to_go_on_from(tmp_path):
    assert newest(tmp_path, 1) == (None, [])
    (tmp_path / "checkpoint_step_5_gpu_0_of_2.pt").touch()      # half a set
    assert newest(tmp_path, 1) == (None, [])


def test_a_damaged_set_of_other_ranks_pushes_no_good_one_out(tmp_path):
    for step, ranks in ((5, 2), (10, 2), (15, 1)):
        save_whole(tmp_path, step, ranks)
    checkpoint.checkpoint_path(tmp_path, 15, 0, 1).write_bytes(b"lost")
    assert checkpoint_sets.complete_sets(tmp_path)[-1] == (15, 1)       # first to be tried
    checkpoint_sets.remove_old(tmp_path, 0)
    assert checkpoint_sets.complete_sets(tmp_path) == [(5, 2), (10, 2), (15, 1)]


# --- the directory ---------------------------------------------------------------------------------------------------


def seen_by_each(output):
    """Each rank sees its own machine's files of the newest set alone, as on a slow network disk."""
    number, glob = rank(), type(output).glob

    def late(self, pattern):
        return [path for path in glob(self, pattern) if "step_10" not in path.name or f"gpu_{number}_" in path.name]

    type(output).glob = late
    clear_leftovers(output)
    return newest(output, 2)


def test_a_set_that_no_rank_sees_as_a_whole_is_neither_deleted_nor_overlooked(tmp_path):
    for step in (5, 10):
        save_whole(tmp_path, step, 2)
    assert run_ranks(seen_by_each, 2, tmp_path) == [(10, []), (10, [])]
    assert checkpoint_sets.complete_sets(tmp_path) == [(5, 2), (10, 2)]


def test_leftovers_go(tmp_path):
    save_whole(tmp_path, 5, 2)
    save_set(tmp_path, 10, [1], 2)
    (tmp_path / ".model.pt.123.tmp").touch()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [path.name for path in sorted(tmp_path.iterdir())]
    assert checkpoint_sets.complete_sets(tmp_path) == [(5, 2)] and len(names(tmp_path)) == 2


def begin(output):
    try:
        start_afresh(output)
    except CheckpointError as error:
        return str(error)


def test_all_ranks_refuse_to_begin_over_an_unfinished_run(tmp_path):
    save_whole(tmp_path, 5, 2)
    for said in run_ranks(begin, 2, tmp_path):
        assert "holds checkpoints of an unfinished run (step 5 of 99); go on from there with --resume True" in said
    assert len(names(tmp_path)) == 2


def test_what_a_finished_run_left_goes(tmp_path):
    save_whole(tmp_path, 99, 2)
    path = checkpoint.checkpoint_path(tmp_path, 50, 0, 1)
    path.with_name(DAMAGED + path.name).touch()
    assert run_ranks(begin, 3, tmp_path) == [None] * 3
    assert not names(tmp_path)


def claimed(output):
    if not output.exists():
        output = output.with_name(str(rank()))
        output.mkdir()
    checkpoint_sets.SECONDS_TO_APPEAR = 0
    try:
        claim(output)
    except CheckpointError as error:
        return str(error)


def test_a_disk_that_is_not_shared_is_noticed_at_the_start(tmp_path):
    for message in run_ranks(claimed, 3, tmp_path / "nowhere"):
        assert "ranks 1, 2 do not see what rank 0 writes there; set `output` to a directory on a disk" in message
    assert [path.name for number in range(3) for path in (tmp_path / str(number)).iterdir()] == [".lock"]
    assert run_ranks(claimed, 2, tmp_path) == [None, None]


def hold(output, ready, end):
    lock = claim(output)
    ready.set()
    end.wait(60)
    del lock


def test_two_runs_do_not_write_to_the_same_place(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, end))
    other.start()
    assert ready.wait(60)
    for message in run_ranks(claimed, 2, tmp_path):
        assert "another run is writing there; end it, or choose another `output`" in message
    other.kill()
    other.join()
    assert run_ranks(claimed, 1, tmp_path) == [None]
