"""Whether all ranks were started alike and see the same files, found out before the first step.

Ranks that differ in a value would train replicas apart without a word; a rank that fails alone leaves the others
waiting for it until a timeout. Here all ranks stop together, each with the same line.
"""

import contextlib
import functools
import hashlib
import pathlib
import secrets
import socket

import torch

from core.config import PATH_KEYS, REPO
from core.distributed import barrier, gather_objects, is_main, rank
from core.errors import UserError
from core.files import appears

# Keys that may differ: places, which are compared by their files' contents, and what does not change the result.
MAY_DIFFER = {*PATH_KEYS, "workspace", "config_file", "name", "num_workers", "frequent"}
ROOMS = ("core", "old_model", "backbones", "losses", "engine", "BCT_methods", "tools")  # with the code of a run


class DisagreementError(UserError):
    """Ranks that differ, or of which some fail alone; raised on all ranks alike."""


def check_same_start(cfg, device, **options):
    """Raise DisagreementError, on all ranks, unless they run the same code on the same kind of device with one config.

    Compared: the code, torch's version, the device's type, the config without MAY_DIFFER, and `options` of the command
    line. All ranks call it together, before any other collective and before they open files.
    """
    keys = {key: value for key, value in cfg.items() if key not in MAY_DIFFER}
    check_ranks_agree(code=code_digest(), torch=torch.__version__, device=device.type, **keys, **options)


def check_ranks_agree(**table):
    """Raise DisagreementError, on all ranks, for the first entry of `table` in which a rank differs from rank 0.

    Of files, compare digests: paths and dates may differ. None stands for a file that is not there.
    """
    tables = gather_objects((socket.gethostname(), table))
    host, first = tables[0]
    for number, (other_host, other) in enumerate(tables):
        for key in first | other:
            if first.get(key) != other.get(key):
                raise DisagreementError(
                    f"rank {number} on {other_host} has {key} = {other.get(key)!r}, rank 0 on {host} has "
                    f"{first.get(key)!r}; start all ranks with the same command, code and files"
                )


@contextlib.contextmanager
def failing_together():
    """An error of the user's or the disk's that only some ranks meet in the block ends all of them.

    All ranks enter it together, and none may wait for another within. The others raise DisagreementError with the
    first failed rank's line.
    """
    error = None
    try:
        yield
    except (UserError, OSError) as met:
        error = met
    line = error and f"rank {rank()} on {socket.gethostname()} failed: {type(error).__name__}: {error}"
    failed = [line for line in gather_objects(line) if line]
    if error:
        raise error
    if failed:
        raise DisagreementError(failed[0])


def check_shared(folder, remedy):
    """Raise DisagreementError, on all ranks, unless all of them see what rank 0 writes in `folder`.

    Each rank may have a path of its own to it. The message ends with `remedy`. Rank 0 creates the folder.
    """
    folder = pathlib.Path(folder)
    probe = folder / gather_objects(f".shared.{secrets.token_hex(8)}.tmp")[0]
    try:
        with failing_together():
            if is_main():
                folder.mkdir(parents=True, exist_ok=True)
                probe.touch()
        blind = [str(number) for number, sees in enumerate(gather_objects(appears(probe))) if not sees]
        barrier()
    finally:
        if is_main():
            probe.unlink(missing_ok=True)
    if blind:
        raise DisagreementError(f"{folder}: not shared, ranks {', '.join(blind)} do not see rank 0's files; {remedy}")


@functools.cache
def code_digest():
    """Digest of the .py files that a run may execute, wherever the repo lies; needs no git."""
    found = hashlib.blake2b(digest_size=8)
    for path in sorted([*REPO.glob("*.py"), *(path for room in ROOMS for path in (REPO / room).rglob("*.py"))]):
        found.update(f"{path.relative_to(REPO)}\n".encode() + path.read_bytes())
    return found.hexdigest()
