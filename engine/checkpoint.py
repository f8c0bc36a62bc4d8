"""Checkpoints: one file a rank and step, whole or absent; a set counts only when every rank's file is there and whole.

With several machines `output` must be a directory that all of them share.
"""

import copy
import pathlib
import re
import zipfile

import torch

from engine.atomic import atomic_write, remove_leftovers
from engine.distributed import all_reduce_, barrier, is_main
from engine.errors import UserError
from engine.recut import recut

KEEP = 2
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
    """torch.load of tensors and plain values alone (`weights_only`); raises CheckpointError naming the file."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__}: {reason})") from error


def checkpoint_path(output, step, rank, world_size):
    return pathlib.Path(output) / f"checkpoint_step_{step}_gpu_{rank}_of_{world_size}.pt"


def complete_sets(output):
    """`[(step, world_size)]` of the sets of which every rank's file is present, oldest first."""
    found = {}
    for path in pathlib.Path(output).glob("checkpoint_step_*.pt"):
        match = _NAME.fullmatch(path.name)
        if match:
            step, rank, world_size = map(int, match.groups())
            found.setdefault((step, world_size), set()).add(rank)
    return sorted(key for key, ranks in found.items() if ranks == set(range(key[1])))


def remove_old(output, rank):
    """Delete this rank's files that are older than the newest KEEP complete sets; newer incomplete sets stay.

    Other ranks may be deleting theirs meanwhile: that changes older sets only, never which ones are the newest KEEP.
    Files of ranks that this run has no longer go with those of rank 0.
    """
    sets = complete_sets(output)
    if len(sets) < KEEP:
        return
    oldest_kept, world_size = sets[-KEEP][0], sets[-1][1]
    for path in pathlib.Path(output).glob("checkpoint_step_*.pt"):
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) < oldest_kept and (int(match[2]) if int(match[2]) < world_size else 0) == rank:
            path.unlink(missing_ok=True)


def load_newest(output, rank, world_size, device, warn):
    """This rank's state of the newest set that is whole, and its file; all ranks call it together. None if none is.

    A set in which any rank finds a file that cannot be read, or that is of another step than its name says, is passed
    over, with a line to `warn`. A set of another number of ranks is made into one of `world_size`: see engine/recut.py.
    """
    for step, ranks in reversed(complete_sets(output)):
        state = problem = None
        try:
            state = _load_set(output, step, ranks, rank, world_size, device)
        except (CheckpointError, FileNotFoundError) as error:
            problem = error
        whole = torch.tensor(int(problem is None), device=device)
        if all_reduce_(whole, torch.distributed.ReduceOp.MIN):
            return state, checkpoint_path(output, step, rank % ranks, ranks)
        if problem is not None:
            warn("%s; going back to the set before that of step %d", problem, step)
    return None


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
    except FileNotFoundError:
        raise
    except Exception as error:  # of a damaged archive nearly anything
        raise CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from error
    if damaged:
        raise CheckpointError(f"{path}: damaged, the checksum of its part {damaged} is wrong")


def start_afresh(output):
    """Before the first step of a run that resumes nothing: clear `output` of a finished run's checkpoints.

    All ranks call it together. Raises CheckpointError where the checkpoints are of a run that has not come to its end:
    days of work are not thrown away because `--resume True` was forgotten.
    """
    sets = complete_sets(output)
    if sets:
        step, ranks = sets[-1]
        path = checkpoint_path(output, step, 0, ranks)
        total = load(path, mmap=True).get("total_steps", step)
        if step < total:
            raise CheckpointError(
                f"{output}: holds checkpoints of an unfinished run (step {step} of {total}); go on from there with "
                f"--resume True, choose another `output`, or delete {output}/checkpoint_step_*.pt"
            )
    barrier()
    if is_main():
        for path in pathlib.Path(output).glob("checkpoint_step_*.pt"):
            path.unlink()
    clear_leftovers(output)


def clear_leftovers(output):
    """Delete what processes that were killed while writing left behind; all ranks call it together."""
    barrier()
    if is_main():
        for name in ("checkpoint_step_*.pt", "model*.pt", "softmax_fc_gpu_*.pt"):
            remove_leftovers(output, name)
    barrier()
