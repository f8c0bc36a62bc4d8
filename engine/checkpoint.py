"""A run's checkpoints on disk: writing them, finding the set to resume from, resharding it for other ranks.

    <output>/checkpoints/000000061440/rank_0_of_2.pt    one file a rank: its whole state, see engine/run_state.py
                                      rank_1_of_2.pt
                                      DONE              written by rank 0 when all of them are on the disk

A set is named by the images seen, so names sort in the order of training, whatever the number of ranks and the batch.
A set without DONE is incomplete: it is never opened, and deleted at the next start. What is read here is unpickled
with `weights_only`. All ranks call the functions of the sets together, and all return or raise alike; with several
machines `output` must be on a disk that they share, which `claim` checks.
"""

import copy
import functools
import operator
import pathlib
import re
import secrets
import shutil
import time

import torch

from core.distributed import barrier, gather_objects, is_main, rank, rows_of_rank, world_size
from core.files import (
    CheckpointError,
    check_whole,
    load,
    remove_leftovers,
    save_atomically,
    sync_directory,
    write_atomically,
)
from engine.monitor import log

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

KEEP = 2  # complete sets
FOLDER, DONE = "checkpoints", "DONE"
DAMAGED = "damaged_"  # put before the name of a set that could not be resumed from
SECONDS_TO_APPEAR = 10  # of a new file, on a disk that several machines share


# --- claiming the output ----------------------------------------------------------------------------------------------


def claim(output):
    """Reserve `output` for this run while the returned file is open (on rank 0), and check that all ranks share it.

    Raises CheckpointError where another run writes there, where a run of an earlier version left its checkpoints, or
    where not all ranks see the same directory: every machine would write parts of sets that never become complete.
    """
    output = pathlib.Path(output)
    lock, refusal = _lock(output) if is_main() else (None, None)
    _raise_on_all_ranks(refusal)
    probe = output / gather_objects(f".shared.{secrets.token_hex(8)}.tmp")[0]
    if is_main():
        probe.touch()
    try:
        barrier()
        blind = [str(number) for number, sees in enumerate(gather_objects(_appears(probe))) if not sees]
    finally:
        if is_main():
            probe.unlink()
    if blind:
        raise CheckpointError(
            f"{output}: ranks {', '.join(blind)} do not see what rank 0 writes there; "
            "set `output` to a directory on a disk that all machines share"
        )
    return lock


def _lock(output):
    """`(open file, why this run may not write here or None)`. The system releases the lock when the process ends."""
    file = open(output / ".lock", "w")
    try:
        # Not flock: forked data workers would hold it for a moment after the process was killed.
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return file, f"{output}: another run is writing there; end it, or choose another `output`"
    except OSError:  # a disk without locks
        pass
    for path in sorted(output.glob("checkpoint_step_*_gpu_*_of_*.pt"))[:1]:
        return file, (
            f"{path}: written by an earlier version of this code, and not resumed by this one; finish the run with "
            f"that version, choose another `output`, or delete {output}/checkpoint_step_*.pt to start over"
        )
    return file, None


def _appears(path):
    """Whether `path` can be seen, if need be some seconds later, as on network disks."""
    return path.exists() or any(time.sleep(1) or path.exists() for _ in range(SECONDS_TO_APPEAR))


def _raise_on_all_ranks(refusal):
    """Raise rank 0's `refusal`, a text, as a CheckpointError on every rank; None: do nothing."""
    if refusal := gather_objects(refusal)[0]:
        raise CheckpointError(refusal)


# --- sets -------------------------------------------------------------------------------------------------------------


def complete_sets(output):
    """The folders of the complete sets, oldest first; on a network disk, those that this rank sees by now."""
    return sorted(path.parent for path in pathlib.Path(output).glob(f"{FOLDER}/[0-9]*/{DONE}"))


def save_set(output, state):
    """Write the set of which `state` is this rank's part, then delete all but the newest KEEP.

    state: as engine/run_state.py makes it; its "images", "step" and "total_steps" are used here.
    """
    folder = pathlib.Path(output) / FOLDER / f"{state['images']:012}"
    save_atomically(state, folder / f"rank_{rank()}_of_{world_size()}.pt")
    barrier()
    if is_main():
        sync_directory(folder.parent)  # with DONE on the disk, the folder must be, too
        sync_directory(folder.parent.parent)
        text = f"step {state['step']} of {state['total_steps']} on {world_size()} ranks\n"
        write_atomically(lambda file: file.write(text.encode()), folder / DONE)
        for old in complete_sets(output)[:-KEEP]:
            _remove(old)


def read_done(folder):
    """`(step, total steps, ranks)` of a complete set; raises CheckpointError where its DONE is damaged."""
    match = re.fullmatch(r"step (\d+) of (\d+) on (\d+) ranks\n", (folder / DONE).read_text(errors="replace"))
    if not match:
        raise CheckpointError(f"{folder / DONE}: damaged, does not say step and ranks")
    return tuple(map(int, match.groups()))


def _remove(folder):
    """Delete a set, DONE first: killed in between, this leaves an incomplete set."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name != DONE):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # NFS keeps a deleted file's name while another process has it open


def _agree_on_sets(output):
    """The complete sets that any rank sees, oldest first; deletes leftovers of killed processes.

    On a network disk a rank may not yet see the newest set of another machine, which must neither be overlooked nor
    deleted. An incomplete set must go: two attempts on CUDA differ, and could complete it together.
    """
    output = pathlib.Path(output)
    complete = sorted(set().union(*gather_objects([path.name for path in complete_sets(output)])))
    if is_main():
        remove_leftovers(output)
        for folder in (output / FOLDER).glob("[0-9]*"):
            if folder.name not in complete:
                _remove(folder)
    barrier()
    return [output / FOLDER / name for name in complete]


def start_afresh(output):
    """Before the first step of a run that resumes nothing: delete a finished run's checkpoints in `output`.

    Raises CheckpointError where the run is not finished: a forgotten `--resume True` must not cost days of work.
    """
    sets = _agree_on_sets(output)
    _raise_on_all_ranks(_unfinished(output, sets[-1]) if sets and is_main() else None)
    if is_main():
        shutil.rmtree(pathlib.Path(output) / FOLDER, ignore_errors=True)
    barrier()


def _unfinished(output, newest):
    """Why a new run must not start over the set `newest`, or None."""
    ways_out = f"--resume True, choose another `output`, or delete {output}/{FOLDER}"
    try:
        step, total, _ = read_done(newest)
    except (CheckpointError, OSError) as error:
        return f"{error}; resume the run with {ways_out}"
    if step < total:
        return f"{output}: holds checkpoints of an unfinished run (step {step} of {total}); resume it with {ways_out}"


# --- resuming ---------------------------------------------------------------------------------------------------------


def load_newest(output, device):
    """`(this rank's state, its file)` of the newest set that is not damaged; None if there is no set.

    A set with a damaged or lost file, of whichever rank, is skipped with a warning on rank 0 and renamed, so that it is
    not taken for the newest again. A set of another number of ranks is resharded.

    Raises CheckpointError, and changes nothing, where all sets are damaged, or where a file cannot be read for a reason
    that is not its own (a disk that is away, out of memory).
    """
    damages = {}
    for folder in reversed(_agree_on_sets(output)):
        found = damage = trouble = None
        try:
            found = _load_set(folder, device)
        except CheckpointError as error:
            damage = str(error)
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        damage_by_rank, trouble_by_rank = zip(*gather_objects((damage, trouble)))
        for number, trouble in enumerate(trouble_by_rank):
            if trouble is not None:
                raise CheckpointError(
                    f"{folder}: cannot be read on rank {number} ({trouble}). Nothing was changed: start again when it "
                    "can; or move this directory away to resume from the set before"
                )
        if not any(damage_by_rank):
            _set_aside(damages)
            return found
        damages[folder] = next(filter(None, damage_by_rank))
    if damages:
        raise CheckpointError(
            f"{output}: every checkpoint is damaged ({next(iter(damages.values()))}); "
            f"to start over, choose another `output` or delete {output}/{FOLDER}"
        )


def _set_aside(damages):
    for folder, damage in damages.items() if is_main() else ():
        aside = folder.with_name(DAMAGED + folder.name)
        log.warning("%s; going back to the set before it, and this one is now %s", damage, aside)
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier attempt
        folder.replace(aside)
    barrier()


def _load_set(folder, device):
    if not _appears(folder / DONE):
        raise CheckpointError(f"{folder / DONE}: no such file")
    ranks = read_done(folder)[2]
    paths = [folder / f"rank_{number}_of_{ranks}.pt" for number in range(ranks)]
    for path in paths[rank() :: world_size()]:  # all ranks together: each once
        if not _appears(path):
            raise CheckpointError(f"{path}: no such file")
        check_whole(path)
    if ranks == world_size():
        return _load_state(paths[rank()], device), paths[rank()]
    # Memory-mapped: of the other ranks' files, only the classes that become this rank's are read.
    state = reshard([_load_state(path, mmap=True) for path in paths], rank(), world_size())
    return copy.deepcopy(state), paths[rank() % ranks]  # an optimiser would go on using the mapped files


def _load_state(path, *args, **kwargs):
    state, images = load(path, *args, **kwargs), int(path.parent.name)
    if not isinstance(state, dict) or state.get("images") != images:
        raise CheckpointError(f"{path}: not the state of a run after {images} images")
    return state


def reshard(states, rank, world_size):
    """The state of `rank` of `world_size`, from the `states` of all ranks of another world size, in order.

    Tensors that "class_sharded" lists, [(path of keys, dim)], are the shards of one tensor over all classes; everything
    else is alike on all ranks but the random states and BatchNorm's statistics. A rank beyond the old ones gets an old
    rank's statistics, and no random states: it keeps the generators that it was seeded with. `states` stays unchanged.
    """
    state = states[rank % len(states)]
    if rank >= len(states):
        state = {**state, "random": None, "sampling": None}
    for path, dim in state["class_sharded"]:
        shards = [functools.reduce(operator.getitem, path, one) for one in states]
        state = _replaced(state, path, _cut(shards, dim, rank, world_size))
    return state


def _cut(shards, dim, rank, world_size):
    """This rank's part of the concatenated shards; reads no more of them than that."""
    share = rows_of_rank(sum(shard.shape[dim] for shard in shards), rank, world_size)
    parts, first = [], 0
    for shard in shards:
        start, stop = (min(max(row - first, 0), shard.shape[dim]) for row in share)
        parts.append(shard.narrow(dim, start, stop - start))
        first += shard.shape[dim]
    return torch.cat(parts, dim)


def _replaced(state, path, value):
    """A copy of the nested dicts with `value` at `path`."""
    key, *rest = path
    return {**state, key: _replaced(state[key], rest, value) if rest else value}
