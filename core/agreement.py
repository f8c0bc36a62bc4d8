"""Whether all ranks were started alike: one table a rank, compared before the first step.

Ranks that differ in a value would train replicas apart without a word, or wait for each other until a timeout.
"""

import functools
import hashlib
import socket

import torch

from core.config import PATH_KEYS, REPO
from core.distributed import gather_objects
from core.errors import UserError

# Keys that may differ: places, which are compared by their files' contents, and what does not change the result.
MAY_DIFFER = {*PATH_KEYS, "workspace", "config_file", "name", "num_workers", "frequent"}
ROOMS = ("core", "old_model", "backbones", "losses", "engine", "BCT_methods", "tools")  # with the code of a run


class DisagreementError(UserError):
    """Ranks that were started with different values; raised on all ranks alike."""


def check_ranks_agree(cfg, device, **facts):
    """Raise DisagreementError, on all ranks, for the first entry in which a rank differs from rank 0.

    Compared: the config without MAY_DIFFER, the code, torch's version, the device's type, and `facts`, such as digests
    of the files that a rank sees. All ranks call it together, before any other collective.
    """
    table = {key: value for key, value in cfg.items() if key not in MAY_DIFFER}
    table |= {"code": code_digest(), "torch": torch.__version__, "device": device.type, **facts}
    tables = gather_objects((socket.gethostname(), table))
    host, first = tables[0]
    for rank, (other_host, other) in enumerate(tables):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise DisagreementError(
                    f"rank {rank} on {other_host} has {key} = {other.get(key)!r}, rank 0 on {host} has "
                    f"{first.get(key)!r}; start all ranks with the same command, code and files"
                )


@functools.cache
def code_digest():
    """Digest of the .py files that a run may execute, wherever the repo lies; needs no git."""
    found = hashlib.blake2b(digest_size=8)
    for path in sorted([*REPO.glob("*.py"), *(path for room in ROOMS for path in (REPO / room).rglob("*.py"))]):
        found.update(f"{path.relative_to(REPO)}\n".encode() + path.read_bytes())
    return found.hexdigest()
