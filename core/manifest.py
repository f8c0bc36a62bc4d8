"""What a made file was made from: `<file>.json` beside it, held by each reader against what it has.

    {"what": "features", "content": "5f3c…", "records": "90ab…", "model": "77e1…", "rows": 3625000, "width": 128,
     "command": "get_feature.py configs/… --SD …"}

`content` is the digest of the file itself: a file that was replaced without its manifest is noticed. The others are
digests of what it was made from: `records` the record set, `model` the model file, `features` the feature file,
`old_model` the old model that a new one was trained against. People bring files of their own: one without a manifest is
used, with a warning.
"""

import functools
import hashlib
import json
import os
import pathlib
import shlex
import sys

from core.errors import UserError, warn
from core.files import atomic_write

WHOLE = 1 << 29  # bytes: larger files are sampled
BLOCKS, BLOCK = 256, 1 << 14  # evenly spread, the first and the last included

_NOUNS = {"records": "record set", "model": "model", "features": "feature file", "old_model": "old model"}


class ManifestError(UserError):
    """A file that is not what its manifest says, or made from something else; the message ends with the next step."""


class Manifest(dict):
    """The manifest of the file `path`; empty if it has none."""

    def __init__(self, path, facts=()):
        super().__init__(facts)
        self.path = pathlib.Path(path)

    def require(self, key, digest, source, remedy):
        """Raise ManifestError if the file was made from another `key` than `source`, whose digest is given."""
        if digest and self.get(key, digest) != digest:
            raise ManifestError(f"{self.path}: made from another {_NOUNS[key]} than {source}; {remedy}")


def manifest_path(path):
    return pathlib.Path(f"{path}.json")


def write_manifest(path, file, what, **facts):
    """Write the manifest of `path`; facts that are None are left out.

    file: the open file that will get this name, complete by now. The manifest comes first: whatever a kill in between
    leaves, the two do not fit together, and no new file is without one.
    """
    command = shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])
    facts = {"what": what, "content": _digest_of(file), **facts, "command": command}
    with atomic_write(manifest_path(path)) as file:
        text = json.dumps({key: value for key, value in facts.items() if value is not None}, indent=1)
        file.write(f"{text}\n".encode())


def read_manifest(path, remedy="write the file again"):
    """The Manifest of the file `path`; empty, with a warning, if it has none.

    Raises ManifestError, which ends with the remedy, if the manifest is damaged or the file has changed since.
    """
    beside = manifest_path(path)
    unchecked = f"{remedy}, or delete {beside.name} to use the file unchecked"
    try:
        facts = json.loads(beside.read_bytes())
        content = facts["content"]
    except FileNotFoundError:
        _warn_once("%s: no %s, so what it was made from is not checked", path, beside.name)
        return Manifest(path)
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{beside}: damaged ({type(error).__name__}: {error}); {unchecked}") from error
    if content != digest(path):
        raise ManifestError(f"{path}: has changed since {beside.name} was written; {unchecked}")
    return Manifest(path, facts)


_warn_once = functools.cache(warn)


# --- digests --------------------------------------------------------------------------------------------------------


def digest(path):
    """Digest of a file's size and contents; of a file above 512 MiB, of 256 blocks spread over it."""
    status = os.stat(path)
    return _digest(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


def record_digest(rec, idx, of_idx=None):
    """Digest of a record set, of index and records; under a second for 5 million images in 30 GB.

    of_idx: the index's own digest, if it is known: then the file `idx` is not read.
    """
    return hashlib.blake2b(f"{of_idx or digest(idx)} {digest(rec)}".encode(), digest_size=16).hexdigest()


@functools.cache
def _digest(path, *_):  # size, time and inode, to notice a change
    with open(path, "rb") as file:
        return _digest_of(file)


def _digest_of(file):
    size = file.seek(0, os.SEEK_END)
    found = hashlib.blake2b(f"{size}\n".encode(), digest_size=16)
    if size <= WHOLE:
        file.seek(0)
        while block := file.read(1 << 20):
            found.update(block)
    else:
        for number in range(BLOCKS):
            file.seek(number * (size - BLOCK) // (BLOCKS - 1))
            found.update(file.read(BLOCK))
    return found.hexdigest()
