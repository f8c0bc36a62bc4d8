"""The checkpoints of a run: a file for each rank and step, of which a set counts only when it is complete and whole.

What is here is called by all ranks together, which then agree: on what lies in `output`, on the set to go on from, on
an error. With several machines `output` must be a directory that all of them share; `claim` holds them to it.
"""

import copy
import math
import pathlib
import re
import secrets
import time

import torch.distributed as dist

from engine.atomic import remove_leftovers
from engine.checkpoint import CheckpointError, check_whole, checkpoint_path, load
from engine.distributed import barrier, is_main
from engine.recut import recut

try:
    import fcntl
except ImportError:     # Windows
    fcntl = None

KEEP = 2
SECONDS_TO_APPEAR = 10      # of a new file, on a disk that other machines share
DAMAGED = "damaged_"        # what the files of a set that was passed over are called from then on, before their names
_UNREADABLE = (math.inf, 0)
_NAME = re.compile(r"checkpoint_step_(\d+)_gpu_(\d+)_of_(\d+)\.pt")


# --- the directory --------------------------------------------------------------------------------------------------


def claim(output):
    """Have `output` for this run alone, while the returned file is open (on rank 0), and see that all ranks share it.

    Raises CheckpointError, on all ranks, where another run is writing there, or where not all ranks see the same
    directory: else each machine's checkpoints would be parts of sets that never become complete, as shows days later.
    """
    lock, free = _lock(pathlib.Path(output) / ".lock") if is_main() else (None, True)
    if not all(_of_all_ranks(free)):
        raise CheckpointError(f"{output}: another run is writing there; end it, or choose another `output`")
    probe = pathlib.Path(output) / _of_all_ranks(f".shared.{secrets.token_hex(8)}.tmp")[0]
    if is_main():
        probe.touch()
    try:
        barrier()
        blind = [str(rank) for rank, sees in enumerate(_of_all_ranks(_appears(probe))) if not sees]
    finally:
        if is_main():
            probe.unlink()
    if blind:
        raise CheckpointError(
            f"{output}: ranks {', '.join(blind)} do not see what rank 0 writes there; set `output` to a directory "
            "on a disk that all machines share, or no checkpoint would ever be whole"
        )
    return lock


def _lock(path):
    """`(open file, whether it is ours)`. The system frees it with the process, however that ends."""
    file = open(path, "w")
    if fcntl is None:
        return file, True
    try:
        # Not flock, which forked data workers would hold on to for a moment after the process was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return file, False
    except OSError:     # a disk that knows no locks
        pass
    return file, True


def _appears(path):
    """Whether `path` can be seen, if need be some seconds later, as on network disks."""
    for _ in range(SECONDS_TO_APPEAR):
        if path.exists():
            return True
        time.sleep(1)
    return path.exists()


def _of_all_ranks(value):
    """`value`, anything that can be pickled, of every rank in turn."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


# --- which sets there are -------------------------------------------------------------------------------------------


def complete_sets(output):
    """`[(step, world_size)]` of the sets of which every rank's file is present, in the order of the training.

    That is not always the order of their steps: gone on with a larger global batch, a run counts fewer of them. Of one
    that cannot be read it is not known; it comes last. This one is for one rank alone.
    """
    return _in_order(_by_set(output, _names(output)))[0]


def _names(output):
    return [path.name for path in pathlib.Path(output).glob("checkpoint_step_*.pt")]


def _by_set(output, names):
    """`{(step, world_size): {rank: path}}` of checkpoint files."""
    found = {}
    for match in filter(None, map(_NAME.fullmatch, names)):
        step, rank, world_size = map(int, match.groups())
        found.setdefault((step, world_size), {})[rank] = pathlib.Path(output) / match.string
    return found


def _on_all_ranks(output):
    """As `_by_set`: what any rank sees, for on a network disk none may see all the newest files of other machines."""
    return _by_set(output, sorted(set().union(*_of_all_ranks(_names(output)))))


def _is_complete(key, files):
    return set(files[key]) == set(range(key[1]))


def _in_order(files):
    """The complete ones of `_by_set`'s, oldest first, and what all of its sets are sorted by, `{key: place}`.

    The same number of ranks means the same global batch (else a run is not gone on with), and so the same count of
    steps: files are opened only where there are sets of several numbers.
    """
    places = {key: (key, key) for key in files}
    if len({world_size for _, world_size in files}) > 1:
        places = {key: (_progress(min(paths.values()), key[0]), key) for key, paths in files.items()}
    return sorted((key for key in files if _is_complete(key, files)), key=places.get), places


def _progress(path, step):
    """`(epoch, images of it that are done)` of a checkpoint file."""
    try:
        state = _of_step(step, path, load(path, mmap=True))
    except (CheckpointError, OSError, RuntimeError, MemoryError):
        return _UNREADABLE
    epoch = state.get("epoch", 0)
    return epoch, (step - epoch * state.get("steps_per_epoch", 0)) * state.get("global_batch", 1)


# --- making room ----------------------------------------------------------------------------------------------------


def remove_old(output, rank):
    """Delete this rank's files of the sets older than the newest KEEP complete ones; after a barrier over saving.

    Other ranks may be deleting theirs meanwhile: that changes older sets only, never which ones are the newest KEEP.
    Files of ranks that this run has no longer go with those of rank 0. Sets that cannot be read are neither counted nor
    deleted.
    """
    files = _by_set(output, _names(output))
    sets, places = _in_order(files)
    sets = [key for key in sets if places[key][0] != _UNREADABLE]
    if len(sets) < KEEP:
        return
    for key, paths in files.items():
        for its_rank, path in paths.items():
            if places[key] < places[sets[-KEEP]] and (its_rank if its_rank < sets[-1][1] else 0) == rank:
                path.unlink(missing_ok=True)


def start_afresh(output):
    """Before the first step of a run that resumes nothing: clear `output` of a finished run's checkpoints.

    Raises CheckpointError where the checkpoints are of a run that has not come to its end: days of work are not thrown
    away because `--resume True` was forgotten.
    """
    files = _on_all_ranks(output)
    refusal = _of_all_ranks(_refusal(output, files) if is_main() else None)[0]
    if refusal:
        raise CheckpointError(refusal)
    if is_main():
        for path in [*(path for paths in files.values() for path in paths.values()), *_set_aside_before(output)]:
            path.unlink(missing_ok=True)
    clear_leftovers(output)


def _refusal(output, files):
    """Why a new run must not begin here, or None."""
    sets, _ = _in_order(files)
    if not sets:
        return None
    step, ranks = sets[-1]
    way_out = f"--resume True, choose another `output`, or delete {output}/checkpoint_step_*.pt"
    try:
        total = load(checkpoint_path(output, step, 0, ranks), mmap=True).get("total_steps", step)
    except (CheckpointError, OSError) as error:
        return f"{error}; go on from an earlier one with {way_out}"
    unfinished = f"{output}: holds checkpoints of an unfinished run (step {step} of {total}); go on from there"
    return f"{unfinished} with {way_out}" if step < total else None


def _set_aside_before(output):
    return pathlib.Path(output).glob(f"{DAMAGED}checkpoint_step_*.pt")


def clear_leftovers(output):
    """Delete what processes that were killed while writing left behind.

    Those are temporary files, and files of sets that have not become complete. The latter would become so with files
    that another attempt writes at the same step, though two attempts on CUDA differ.
    """
    files = _on_all_ranks(output)
    if is_main():
        remove_leftovers(output, "*")
        for path in (path for key, paths in files.items() if not _is_complete(key, files) for path in paths.values()):
            path.unlink(missing_ok=True)
    barrier()


# --- going on -------------------------------------------------------------------------------------------------------


def load_newest(output, rank, world_size, device, warn):
    """This rank's state of the newest set that is whole, and its file. None if there is no set at all.

    A set in which any rank finds a file that is damaged, or of another step than its name says, is passed over, with a
    line to `warn` on rank 0, and renamed: what the run writes from there on would be older than it by its name, or
    stand in one set with a file of it. A set of another number of ranks is made into one of `world_size`: see
    engine/recut.py.

    Raises CheckpointError, on all ranks, and changes nothing, where there are sets but none is whole, or where a file
    cannot be read for a reason that is not its own (a disk that is away, too little memory).
    """
    passed_over = []
    order = _of_all_ranks(_in_order(_on_all_ranks(output))[0])[0]
    for step, ranks in reversed(order):
        state = damage = trouble = None
        try:
            state = _load_set(output, step, ranks, rank, world_size, device)
        except CheckpointError as error:
            damage = str(error)
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        said = _of_all_ranks((damage, trouble))
        for its_rank, (_, trouble) in enumerate(said):
            if trouble is not None:
                raise CheckpointError(
                    f"{checkpoint_path(output, step, its_rank % ranks, ranks)}: cannot be read on rank {its_rank} "
                    f"({trouble}). Nothing was changed: start again when it can be; or, to go on from an earlier one, "
                    f"move checkpoint_step_{step}_* away"
                )
        damages = [damage for damage, _ in said if damage is not None]
        if not damages:
            _set_aside(output, passed_over, warn)
            return state, checkpoint_path(output, step, rank % ranks, ranks)
        passed_over.append((step, ranks, damages[0]))
    if passed_over:
        raise CheckpointError(
            f"{output}: none of its checkpoints is whole ({passed_over[0][2]}); to begin anew, choose another `output` "
            f"or delete {output}/checkpoint_step_*.pt"
        )
    return None


def _set_aside(output, sets, warn):
    for step, ranks, damage in sets if is_main() else ():
        warn("%s; going back to the set before that of step %d, whose files are now %s*", damage, step, DAMAGED)
        for path in (checkpoint_path(output, step, rank, ranks) for rank in range(ranks)):
            if path.exists():
                path.replace(path.with_name(DAMAGED + path.name))
    barrier()


def _load_set(output, step, ranks, rank, world_size, device):
    paths = [checkpoint_path(output, step, old, ranks) for old in range(ranks)]
    mine = [paths[rank]] if ranks == world_size else paths[rank::world_size]
    for path in mine:
        if not _appears(path):
            raise CheckpointError(f"{path}: no such file")
        check_whole(path)
    if ranks == world_size:
        return _of_step(step, paths[rank], load(paths[rank], device))
    # Memory-mapped: of the other ranks' files only the classes that become this rank's are read.
    states = [_of_step(step, path, load(path, mmap=True)) for path in paths]
    return copy.deepcopy(recut(states, rank, world_size))   # an optimiser would go on using the mapped files


def _of_step(step, path, state):
    if not isinstance(state, dict) or state.get("step") != step:
        raise CheckpointError(f"{path}: its content is not that of step {step}")
    return state
