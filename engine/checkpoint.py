"""Checkpoints: one file a rank and step, whole or absent; a set counts only when every rank's file is there and whole.

With several machines `output` must be a directory that all of them share; `check_shared` holds them to it.
"""

import copy
import errno
import math
import pathlib
import re
import secrets
import time
import zipfile

import torch
import torch.distributed as dist

from engine.atomic import atomic_write, remove_leftovers
from engine.distributed import all_reduce_, barrier, is_main
from engine.errors import UserError
from engine.recut import recut

KEEP = 2
SECONDS_TO_APPEAR = 10      # of a new file, on a disk that other machines share
DAMAGED = "damaged_"    # what the files of a set that was passed over are called from then on, before their names
_REFUSED = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # by the system
_NAME = re.compile(r"checkpoint_step_(\d+)_gpu_(\d+)_of_(\d+)\.pt")


class CheckpointError(UserError):
    """A checkpoint or model file that cannot be used; the message names it and says what to do."""


def save_atomically(state, path):
    """torch.save to a temporary name beside `path`, synced to disk, then renamed: a reader sees all of it or none."""
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__     # torch puts an error of its own over it
        if not isinstance(reason, OSError):
            raise
        raise CheckpointError(
            f"{path}: could not be written ({reason.strerror}); earlier checkpoints are intact: "
            "make room, then go on with --resume True"
        ) from error


def load(path, map_location="cpu", mmap=False):
    """torch.load of tensors and plain values alone (`weights_only`).

    Raises CheckpointError, naming the file, for one that is damaged; what the system refuses (a missing file, another
    user's, too little memory) goes through as it is, for then the file may be a good one.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:
        raise _as_damage(path, error) from error


def _as_damage(path, error):
    """The CheckpointError for what reading a file raised, which of a damaged one is nearly anything.

    Re-raises what says nothing about the content.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or getattr(error, "errno", None) in _REFUSED:
        raise error
    reason = str(error).partition("\n")[0]
    return CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__}: {reason})")


def checkpoint_path(output, step, rank, world_size):
    return pathlib.Path(output) / f"checkpoint_step_{step}_gpu_{rank}_of_{world_size}.pt"


def complete_sets(output):
    """`[(step, world_size)]` of the sets of which every rank's file is present, in the order of the training.

    That is not always the order of their steps: gone on with a larger global batch, a run counts fewer of them.
    """
    files = _files(output)
    order = _order(files)
    return sorted((key for key in files if _is_complete(key, files)), key=order.get)


def _files(output):
    """`{(step, world_size): {rank: path}}` of all checkpoint files."""
    found = {}
    for path in pathlib.Path(output).glob("checkpoint_step_*.pt"):
        match = _NAME.fullmatch(path.name)
        if match:
            step, rank, world_size = map(int, match.groups())
            found.setdefault((step, world_size), {})[rank] = path
    return found


def _is_complete(key, files):
    return set(files[key]) == set(range(key[1]))


def _order(files):
    """`{(step, world_size): what to sort by}`.

    The same number of ranks means the same global batch (else a run is not gone on with), and so the same count of
    steps: files are opened only where there are sets of several numbers.
    """
    if len({world_size for _, world_size in files}) < 2:
        return {key: key for key in files}
    return {key: (_progress(min(paths.values()), key[0]), key) for key, paths in files.items()}


def _progress(path, step):
    """`(epoch, images of it that are done)` of a checkpoint file; infinite if damaged, so that it is not overlooked."""
    try:
        state = _of_step(step, path, load(path, mmap=True))
    except CheckpointError:
        return math.inf, step
    except FileNotFoundError:   # rank 0 is deleting this one
        return -1, step
    epoch = state.get("epoch", 0)
    return epoch, (step - epoch * state.get("steps_per_epoch", 0)) * state.get("global_batch", 1)


def remove_old(output, rank):
    """Delete this rank's files that are older than the newest KEEP complete sets; newer incomplete sets stay.

    Other ranks may be deleting theirs meanwhile: that changes older sets only, never which ones are the newest KEEP.
    Files of ranks that this run has no longer go with those of rank 0.
    """
    files = _files(output)
    order = _order(files)
    sets = sorted((key for key in files if _is_complete(key, files)), key=order.get)
    if len(sets) < KEEP:
        return
    for key, paths in files.items():
        for its_rank, path in paths.items():
            if order[key] < order[sets[-KEEP]] and (its_rank if its_rank < sets[-1][1] else 0) == rank:
                path.unlink(missing_ok=True)


def load_newest(output, rank, world_size, device, warn):
    """This rank's state of the newest set that is whole, and its file; all ranks call it together. None if none is.

    A set in which any rank finds a file that cannot be read, or that is of another step than its name says, is passed
    over, with a line to `warn`, and renamed: what the run writes from there on would be older than it by its name, or
    stand in one set with a file of it. A set of another number of ranks is made into one of `world_size`: see
    engine/recut.py.
    """
    # Of rank 0: on a network disk another machine may not see the newest file yet, and would go on from another step.
    for step, ranks in reversed(_of_rank_zero(complete_sets(output))):
        state = problem = None
        try:
            state = _load_set(output, step, ranks, rank, world_size, device)
        except (CheckpointError, FileNotFoundError) as error:
            problem = error
        whole = torch.tensor(int(problem is None), device=device)
        if all_reduce_(whole, dist.ReduceOp.MIN):
            return state, checkpoint_path(output, step, rank % ranks, ranks)
        if problem is not None:
            warn("%s; going back to the set before that of step %d, whose files are now %s*", problem, step, DAMAGED)
        if is_main():
            _set_aside(output, step, ranks)
    return None


def _of_rank_zero(value):
    """`value`, anything that can be pickled, as rank 0 has it."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def _set_aside(output, step, ranks):
    for path in (checkpoint_path(output, step, rank, ranks) for rank in range(ranks)):
        if path.exists():
            path.replace(path.with_name(DAMAGED + path.name))


def _load_set(output, step, ranks, rank, world_size, device):
    paths = [checkpoint_path(output, step, old, ranks) for old in range(ranks)]
    if ranks == world_size:
        check_whole(paths[rank])
        return _of_step(step, paths[rank], load(paths[rank], device))
    for path in paths[rank::world_size]:
        check_whole(path)
    # Memory-mapped: of the other ranks' files only the classes that become this rank's are read.
    states = [_of_step(step, path, load(path, mmap=True)) for path in paths]
    return copy.deepcopy(recut(states, rank, world_size))   # an optimiser would go on using the mapped files


def _of_step(step, path, state):
    if not isinstance(state, dict) or state.get("step") != step:
        raise CheckpointError(f"{path}: its content is not that of step {step}")
    return state


def check_whole(path):
    """Hold a file that torch.save wrote against its checksums, which torch.load does not; raises CheckpointError."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        raise _as_damage(path, error) from error
    if damaged:
        raise CheckpointError(f"{path}: damaged, the checksum of its part {damaged} is wrong")


def check_shared(output):
    """Raise CheckpointError, on all ranks, where not all of them see the same directory `output`.

    Else each machine's checkpoints would be parts of sets that never become complete, which shows days later.
    """
    if not dist.is_initialized():
        return
    probe = pathlib.Path(output) / _of_rank_zero(f".shared.{secrets.token_hex(8)}.tmp")
    if is_main():
        probe.touch()
    try:
        barrier()
        seen = [None] * dist.get_world_size()
        dist.all_gather_object(seen, _appears(probe))
    finally:
        if is_main():
            probe.unlink()
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    if blind:
        raise CheckpointError(
            f"{output}: ranks {', '.join(map(str, blind))} do not see what rank 0 writes there; set `output` to a "
            "directory on a disk that all machines share, or no checkpoint would ever be whole"
        )


def _appears(path):
    """Whether `path` can be seen, if need be some seconds later, as on network disks."""
    for _ in range(SECONDS_TO_APPEAR):
        if path.exists():
            return True
        time.sleep(1)
    return path.exists()


def start_afresh(output):
    """Before the first step of a run that resumes nothing: clear `output` of a finished run's checkpoints.

    All ranks call it together. Raises CheckpointError where the checkpoints are of a run that has not come to its end:
    days of work are not thrown away because `--resume True` was forgotten.
    """
    sets = complete_sets(output)
    if sets:
        _refuse_unfinished(output, *sets[-1])
    barrier()
    if is_main():
        for paths in _files(output).values():
            for path in paths.values():
                path.unlink()
    clear_leftovers(output)


def _refuse_unfinished(output, step, ranks):
    way_out = f"--resume True, choose another `output`, or delete {output}/checkpoint_step_*.pt"
    try:
        total = load(checkpoint_path(output, step, 0, ranks), mmap=True).get("total_steps", step)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; go on from an earlier one with {way_out}") from error
    if step < total:
        raise CheckpointError(
            f"{output}: holds checkpoints of an unfinished run (step {step} of {total}); go on from there "
            f"with {way_out}"
        )


def clear_leftovers(output):
    """Delete what processes that were killed while writing left behind; all ranks call it together.

    Those are temporary files, and files of sets that have not become complete. The latter would become so with files
    that another attempt writes at the same step, though two attempts on CUDA differ.
    """
    barrier()
    if is_main():
        remove_leftovers(output, "*")
        files = _files(output)
        for path in (path for key, paths in files.items() if not _is_complete(key, files) for path in paths.values()):
            path.unlink()
    barrier()
