"""A run's files on disk: whose they are, writing a checkpoint set, finding the one to resume from, resharding it.

    <output>/checkpoints/000000061440/rank_0_of_2.pt    one file per rank: its whole state, see engine/run_state.py
                                      rank_1_of_2.pt
                                      DONE              written by rank 0 once all of them are on disk
    <output>/run.json                                   method and values of the run, and who started it last

A set is named by the images seen, so names sort in training order for any number of ranks and any batch size. A set
without DONE is incomplete: it is never read, and deleted at the next start. Files are read with `weights_only`. All
ranks call these functions together, and all return or all raise; with several machines `output` must be on a shared
disk, which `claim` checks.
"""

import contextlib
import copy
import functools
import json
import operator
import os
import pathlib
import re
import shutil
import socket

import torch

from core.agreement import DisagreementError, check_shared
from core.distributed import barrier, gather_objects, is_main, rank, rows_of_rank, world_size
from core.errors import UserError
from core.files import appears, lock, remove_leftovers, sync_directory
from core.state_file import CheckpointError, check_whole, load, save_atomically, write_atomically
from engine.monitor import log

KEEP = 2  # complete sets
FOLDER, DONE, RUN = "checkpoints", "DONE", "run.json"
DAMAGED = "damaged_"  # prefix of a set that could not be resumed from


# --- claiming the output ----------------------------------------------------------------------------------------------


def claim(output):
    """Lock `output` for this run while the returned file is open (on rank 0), and check that all ranks share it.

    Creates the directory, and removes it again if not all see it. Raises CheckpointError if another run writes there or
    if it has checkpoints of an earlier version of this code, DisagreementError if not all ranks see the same directory:
    every machine would write parts of sets that never become complete.
    """
    output = pathlib.Path(output)
    new = not output.exists()
    lock, refusal = _lock(output) if is_main() else (None, None)
    _raise_on_all_ranks(refusal)
    try:
        check_shared(output, "set `output` to a directory on a disk that all machines share")
    except DisagreementError:
        if is_main() and new:
            (output / ".lock").unlink()
            with contextlib.suppress(OSError):  # NFS keeps a deleted file while it is open
                output.rmdir()
        raise
    return lock


def _lock(output):
    """`(open file, why this run must not write here, or None)`. The lock ends with the process."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = lock(output / ".lock")
    except UserError as error:
        return None, f"{error}, or choose another `output`"
    except OSError as error:
        return None, f"{output}: not a directory to write in ({error.strerror}); choose another `output`"
    for path in sorted(output.glob("checkpoint_step_*_gpu_*_of_*.pt"))[:1]:
        return file, (
            f"{path}: written by an earlier version of this code, cannot be resumed; finish the run with that version, "
            f"choose another `output`, or delete {output}/checkpoint_step_*.pt to start over"
        )
    return file, None


def _raise_on_all_ranks(refusal):
    """Raise rank 0's `refusal`, a text, as a CheckpointError on every rank; None: do nothing."""
    if refusal := gather_objects(refusal)[0]:
        raise CheckpointError(refusal)


# --- whose run it is --------------------------------------------------------------------------------------------------


def _agent():
    """This rank's torchrun, "host pid start time", which stays the same when it restarts its ranks; "" without one.

    A rank that a wrapper script starts sees that script instead, another one at each restart.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    try:
        stat = pathlib.Path(f"/proc/{os.getppid()}/stat").read_text()
    except OSError:  # not Linux
        stat = ""
    # Field 22 of proc(5); the second one, the command in brackets, may have spaces of its own.
    return f"{socket.gethostname()} {os.getppid()} {' '.join(stat.rpartition(')')[2].split()[19:20])}"


def _launch():
    """The agents of all ranks, sorted. Nodes may come and go: launches that share an agent are the same one."""
    return sorted(set(gather_objects(_agent())) - {""})


def sign(output, settings):
    """Note in run.json what is run now, and by whom.

    settings: of engine/run_state.py. Call it after resuming or `start_afresh`, before the first step.
    """
    launch = _launch()
    if is_main():
        text = json.dumps({**settings, "launch": launch}, indent=1)
        write_atomically(lambda file: file.write(text.encode()), pathlib.Path(output) / RUN)


def _signed(output):
    """The content of run.json; {} without one, or if it is damaged."""
    try:
        signed = json.loads((pathlib.Path(output) / RUN).read_text())
    except (OSError, ValueError):
        return {}
    return signed if isinstance(signed, dict) else {}


def continues(output, restarted, overwrite):
    """Whether this start goes on with the run in `output` although `resume` is not set; the same on all ranks.

    It does if the same launch began that run: torchrun has restarted its ranks, or another node has joined them. Where
    its agents are not known, a restart goes on with an unfinished run, unless that was to be overwritten.

    restarted: whether torchrun counts a restart. overwrite: of the config.
    """
    launch, sets = set(_launch()), complete_sets(output)
    ours = not launch.isdisjoint(_signed(output).get("launch", []))
    unfinished = restarted and not overwrite and sets and _unfinished(output, sets[-1])
    return gather_objects(bool(ours or unfinished))[0]


# --- sets -------------------------------------------------------------------------------------------------------------


def complete_sets(output):
    """The folders of the complete sets, oldest first; on a network disk, those that this rank sees by now."""
    return sorted(path.parent for path in pathlib.Path(output).glob(f"{FOLDER}/[0-9]*/{DONE}"))


def save_set(output, state):
    """Write a set, of which `state` is this rank's part, then delete all but the newest KEEP.

    state: from engine/run_state.py; "images", "step" and "total_steps" are used here.
    """
    folder = pathlib.Path(output) / FOLDER / f"{state['images']:012}"
    save_atomically(state, folder / f"rank_{rank()}_of_{world_size()}.pt")
    barrier()
    if is_main():
        sync_directory(folder.parent)  # before DONE is on disk, the folder must be
        sync_directory(folder.parent.parent)
        text = f"step {state['step']} of {state['total_steps']} on {world_size()} ranks\n"
        write_atomically(lambda file: file.write(text.encode()), folder / DONE)
        for old in complete_sets(output)[:-KEEP]:
            _remove(old)


def read_done(folder):
    """`(step, total steps, ranks)` of a complete set; raises CheckpointError if its DONE is damaged."""
    match = re.fullmatch(r"step (\d+) of (\d+) on (\d+) ranks\n", (folder / DONE).read_text(errors="replace"))
    if not match:
        raise CheckpointError(f"{folder / DONE}: damaged, step and ranks are unreadable")
    return tuple(map(int, match.groups()))


def _remove(folder):
    """Delete a set, DONE first, so that a kill in between leaves an incomplete set."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name != DONE):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # NFS keeps a deleted file while another process has it open


def _agree_on_sets(output):
    """The complete sets that any rank sees, oldest first; deletes leftovers of killed processes.

    On a network disk a rank may not yet see another machine's newest set, which must be neither missed nor deleted.
    Incomplete sets are deleted, because two attempts, which differ on CUDA, could complete one together.
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


def start_afresh(output, settings, overwrite=False):
    """Before the first step of a new run: delete a finished run's checkpoints in `output`.

    settings: this run's, as for `sign`; overwrite: of the config.
    Raises CheckpointError, unless with `overwrite`, if that run is unfinished (forgetting `--resume True` must not cost
    days of work), or if it was of another method or had other values.
    """
    output = pathlib.Path(output)
    sets = _agree_on_sets(output)
    _raise_on_all_ranks(_occupied(output, sets, settings) if is_main() and not overwrite else None)
    if is_main():
        shutil.rmtree(output / FOLDER, ignore_errors=True)
    barrier()


def _occupied(output, sets, settings):
    """Why a new run must not replace the one in `output`, or None."""
    if sets and (unfinished := _unfinished(output, sets[-1])):
        return unfinished
    if not sets and not (output / "model.pt").exists():
        return None
    signed, how = _signed(output), "choose another `output`, or overwrite it with --overwrite True"
    if not signed:
        return f"{output}: has a run whose method and values are unknown, for want of {RUN}; {how}"
    for key, now in settings.items():
        if signed.get(key, now) != now:
            return f"{output}: has a run with {key} = {signed[key]!r}, this one has {now!r}; {how}"


def _unfinished(output, newest):
    """Why the run whose newest set is `newest` must be resumed, or None."""
    how = "resume it with --resume True, choose another `output`, or begin anew with --overwrite True"
    try:
        step, total, _ = read_done(newest)
    except (CheckpointError, OSError) as error:
        return f"{error}; if it belongs to a run, {how}"
    if step < total:
        return f"{output}: has checkpoints of an unfinished run (step {step} of {total}); {how}"


# --- resuming ---------------------------------------------------------------------------------------------------------


def load_newest(output, device):
    """`(this rank's state, its file)` of the newest intact set, resharded if need be; None if there is no set.

    A set with any damaged or missing file is skipped with a warning on rank 0 and renamed, so that it is not tried
    again.

    Raises CheckpointError, and changes nothing, if all sets are damaged, or if a file cannot be read for another reason
    than damage (disk gone, out of memory).
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
                    f"{folder}: cannot be read on rank {number} ({trouble}). Nothing was changed: fix that and start "
                    "again, or move this directory away to resume from the previous set"
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
        log.warning("%s; renamed the set to %s and falling back to the previous one", damage, aside)
        shutil.rmtree(aside, ignore_errors=True)  # from an earlier attempt
        folder.replace(aside)
    barrier()


def _load_set(folder, device):
    if not appears(folder / DONE):
        raise CheckpointError(f"{folder / DONE}: no such file")
    ranks = read_done(folder)[2]
    paths = [folder / f"rank_{number}_of_{ranks}.pt" for number in range(ranks)]
    for path in paths[rank() :: world_size()]:  # the ranks share the work: each file once
        if not appears(path):
            raise CheckpointError(f"{path}: no such file")
        check_whole(path)
    if ranks == world_size():
        return _load_state(paths[rank()], device), paths[rank()]
    # Memory-mapped: of other ranks' files, only the classes that this rank takes over are read.
    state = reshard([_load_state(path, mmap=True) for path in paths], rank(), world_size())
    return copy.deepcopy(state), paths[rank() % ranks]  # else the optimiser would keep using the mapped files


def _load_state(path, *args, **kwargs):
    state, images = load(path, *args, **kwargs), int(path.parent.name)
    if not isinstance(state, dict) or state.get("images") != images:
        raise CheckpointError(f"{path}: not the state of a run after {images} images")
    return state


def reshard(states, rank, world_size):
    """The state of `rank` of `world_size`, from the `states` of all ranks of another world size, in rank order.

    Tensors listed in "class_sharded", [(path of keys, dim)], are shards of one tensor over all classes; everything else
    is the same on all ranks, except random states and BatchNorm statistics. A rank that is new gets an old rank's
    statistics and no random states: it keeps the generators it was seeded with. `states` is not modified.
    """
    state = states[rank % len(states)]
    if rank >= len(states):
        state = {**state, "random": None, "sampling": None}
    for path, dim in state["class_sharded"]:
        shards = [functools.reduce(operator.getitem, path, one) for one in states]
        state = _replaced(state, path, _cut(shards, dim, rank, world_size))
    return state


def _cut(shards, dim, rank, world_size):
    """This rank's part of the concatenated shards; reads only that part."""
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
