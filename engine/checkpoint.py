"""Checkpoints: one file a rank and step, whole or absent; a set counts only when every rank's file is there."""

import pathlib
import re

import torch

from engine.atomic import atomic_write
from engine.errors import UserError

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
            f"{path}: could not be written ({reason.strerror}); earlier checkpoints are intact"
        ) from error


def load(path, map_location="cpu"):
    """torch.load of tensors and plain values alone (`weights_only`); raises CheckpointError naming the file."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
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
    """
    sets = complete_sets(output)
    if len(sets) < KEEP:
        return
    oldest_kept = sets[-KEEP][0]
    for path in pathlib.Path(output).glob(f"checkpoint_step_*_gpu_{rank}_of_*.pt"):
        match = _NAME.fullmatch(path.name)
        if match and int(match.group(1)) < oldest_kept:
            path.unlink(missing_ok=True)
