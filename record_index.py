"""The `.idx` of a record file: one line `key<TAB>offset` per record, read once into a binary file beside it.

The text takes seconds for ten million lines, and 50 bytes of memory a line. So one process writes `train.idx.bin`, and
all others find an offset in it by one read. After 4096 bytes with a checksum and facts in JSON it has int64 columns:

    offsets [n + 1]     by ascending key; the last is 0
    sorted_keys [n]     left out where they are consecutive
    keys [n]            in the order of the lines; left out where it ascends

It belongs to an index of that size in which sampled lines say the same; otherwise it is written again. An index of less
than SMALL bytes, or in a folder where nothing can be written, is read into memory by each process.
"""

import bisect
import hashlib
import json
import os
import pathlib
import re
import struct
import time
import weakref

import numpy as np

from core.errors import UserError, warn
from core.files import atomic_write, lock
from core.manifest import digest
from core.rows import read_rows

SMALL = 1 << 24  # bytes of text: a million records, read in half a second
HEADER = 4096  # bytes before the columns
SAMPLED = 256  # lines compared with the text, evenly spread
LONGEST = 39  # bytes of a line: 18 digits, tab, 18 digits, line end
AGAIN = "copy the index again, or delete it and write another with `python recordio.py index`"

_LINE = re.compile(rb"([0-9]{1,18})\t([0-9]{1,18})\r?")
_TWO = struct.Struct("<qq")


class RecordError(UserError, ValueError):
    """A damaged or inconsistent record file or index; the message names file, key and offset."""


def index_path(path):
    """`x/train.rec` -> `x/train.idx`"""
    return pathlib.Path(path).with_suffix(".idx")


def binary_path(idx_path):
    """`x/train.idx` -> `x/train.idx.bin`"""
    return pathlib.Path(f"{idx_path}.bin")


class RecordIndex:
    """Where the records of a file lie; `open_index` makes it.

    facts: {"lines": n, "first": smallest key, "last": key of the largest offset, "missing": the smallest key missing
    from 0, 1, 2, … or None}; with a binary file also "digest": `core.manifest.digest` of the text.
    columns: {name: int64 values}, see this module; read-only arrays or `_Column`s.

    `keys`: int64 [n] in the order of the lines: a range, an array or a `_Column`.
    """

    def __init__(self, facts, columns):
        self.facts, self.count, self.first = facts, facts["lines"], facts["first"]
        self.offsets = columns["offsets"]
        self.consecutive = "sorted_keys" not in columns
        # Rare, and searched: kept in memory.
        self.sorted_keys = range(self.first, self.first + self.count) if self.consecutive else columns["sorted_keys"][:]
        self.keys = columns.get("keys", self.sorted_keys)
        # Python integers: the array's own would cost as much as the read.
        self.pair = self.offsets.pair if isinstance(self.offsets, _Column) else _Pairs(self.offsets)

    def row(self, key):
        """Position of `key` among the sorted keys; -1 or beyond the last one if absent."""
        if self.consecutive:
            return key - self.first
        row = bisect.bisect_left(self.sorted_keys, key)
        return row if row < self.count and self.sorted_keys[row] == key else -1

    def says(self, key, offset):
        """Whether the record `key` is there, at `offset`."""
        row = self.row(key)
        return 0 <= row < self.count and self.pair(row)[0] == offset

    def offsets_of(self, keys):
        """`(int64 [B], bool [B])` of keys int64 [B]: their offsets, and which of them are there."""
        rows = keys - self.first if self.consecutive else np.searchsorted(self.sorted_keys, keys)
        found = (rows >= 0) & (rows < self.count)
        rows = np.where(found, rows, 0)
        if not self.consecutive:
            found &= self.sorted_keys[rows] == keys
        return self.offsets[rows], found


class _Pairs:
    """`pair(row)`: the offset of a row and the next one's, Python integers."""

    def __init__(self, offsets):
        self.values = memoryview(offsets)

    def __call__(self, row):
        return self.values[row], self.values[row + 1]


class _Column:
    """int64 [n] from byte `begin` of the binary index `path`, read by system calls: see core/rows.py.

    `column[i]` is a Python integer, `column[rows]` an array, for rows int64 [B] or a slice.
    """

    def __init__(self, path, begin, count):
        self.path, self.begin, self.count = path, begin, count
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)

    def __reduce__(self):
        return _Column, (self.path, self.begin, self.count)

    def __len__(self):
        return self.count

    def __getitem__(self, rows):
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(self.count))
        if np.ndim(rows):
            values = np.empty(len(rows), "<i8")
            read_rows(self.file, self.begin, rows, values, self._fail)
            return values
        return int(self[np.array([range(self.count)[rows]])][0])

    def pair(self, row):
        data = os.pread(self.file, 16, self.begin + 8 * row)
        return _TWO.unpack(data) if len(data) == 16 else self._fail(row, None)

    def _fail(self, row, why):
        raise RecordError(f"{self.path}: {why or 'truncated'} at line {row}; delete it: it is written again")


def open_index(path):
    """The RecordIndex of the `.idx` at `path`. Raises RecordError, naming the line or the key, for a wrong index."""
    if os.path.getsize(path) < SMALL:
        return RecordIndex(*_parsed(path))
    binary = binary_path(path)
    return _opened(path, binary) or _written(path, binary) or RecordIndex(*_parsed(path))


def _opened(path, binary):
    """The index by its binary file, or None if there is none or, said in one line, it is not this index's."""
    try:
        with open(binary, "rb") as file:
            size, (check, _, text) = os.fstat(file.fileno()).st_size, file.read(HEADER).rstrip().partition(b" ")
        if check.decode() != _check(text):
            raise ValueError("damaged")
        facts = json.loads(text)
        length = 8 * (facts["lines"] + 1)
        if size != HEADER + length * len(facts["columns"]):
            raise ValueError("truncated")
        columns = {}
        for number, name in enumerate(facts["columns"]):
            columns[name] = _Column(binary, HEADER + number * length, facts["lines"] + (name == "offsets"))
        index = RecordIndex(facts, columns)
        if facts["size"] != os.path.getsize(path) or not all(index.says(*line) for line in _sampled_lines(path)):
            raise ValueError(f"of another {path.name}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warn("%s: %s; writing it again", binary, str(error).partition("\n")[0])
        return None
    return index


def _sampled_lines(path):
    """`(key, offset)` of lines spread evenly over the index, (-1, -1) for a malformed one."""
    size, window = os.path.getsize(path), 2 * LONGEST
    with open(path, "rb") as file:
        for number in range(SAMPLED if size > window else min(size, 1)):
            file.seek(number * (size - window) // (SAMPLED - 1))
            lines = file.read(window).removesuffix(b"\n").split(b"\n")
            if number > 0:  # else the first is whole
                lines = lines[-1:] if number == SAMPLED - 1 else lines[1:] or [b""]
            match = _LINE.fullmatch(lines[0])
            yield (int(match[1]), int(match[2])) if match else (-1, -1)


def _written(path, binary):
    """The index, whose binary file one process writes while others wait; None, said in one line, where it cannot be."""
    beside = binary.with_name(f".{binary.name}.lock")
    try:
        with _lock_once_free(beside):
            if not binary.exists() or _opened(path, binary) is None:
                warn("%s: writing it, so that no other process reads the text", binary)
                _write(path, binary)
            beside.unlink(missing_ok=True)
    except OSError as error:
        warn("%s: cannot be written (%s): each process reads the text", binary, error.strerror)
        return None
    return _opened(path, binary)


def _lock_once_free(path):
    while True:
        try:
            return lock(path)
        except UserError:
            time.sleep(0.1)


def _write(path, binary):
    facts, columns = _parsed(path)
    facts |= {"size": os.path.getsize(path), "digest": digest(path), "columns": list(columns)}
    text = json.dumps(facts).encode()
    with atomic_write(binary) as file:
        file.write(f"{_check(text)} ".encode() + text.ljust(HEADER - 33))
        for values in columns.values():
            file.write(np.resize(values, facts["lines"] + 1).astype("<i8", copy=False).data)


def _check(text):
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _parsed(path):
    """`(facts, columns)` of the text."""
    keys, offsets = read_lines(path)
    order = None if (np.diff(keys) > 0).all() else np.argsort(keys, kind="stable")
    columns = {"offsets": np.append(offsets if order is None else offsets[order], 0)}
    ordered = keys if order is None else keys[order]
    repeated = np.flatnonzero(np.diff(ordered) == 0)
    if len(repeated):
        raise RecordError(f"{path}: duplicate key {ordered[repeated[0]]}; {AGAIN}")
    count, first = len(keys), int(ordered[0]) if len(keys) else 0
    if count and int(ordered[-1]) - first + 1 != count:
        columns["sorted_keys"] = ordered
    if order is not None:
        columns["keys"] = keys
    wrong = np.flatnonzero(ordered != np.arange(count))
    last = int(ordered[np.argmax(columns["offsets"][:-1])]) if count else None
    return {"lines": count, "first": first, "last": last, "missing": int(wrong[0]) if len(wrong) else None}, columns


def read_lines(path, block=1 << 23):
    """Keys and offsets, each int64 [n], in file order. Reads `block` bytes at a time."""
    keys, offsets, lines = [], [], 0
    with open(path, "rb") as file:
        while text := file.read(block):
            text += file.readline(64)  # a longer line is malformed anyway
            text = text.replace(b"\r\n", b"\n")
            table = _parse_lines(text if text.endswith(b"\n") else text + b"\n")
            if table is None:
                numbered = enumerate(text.split(b"\n"), lines + 1)
                number, line = next(each for each in numbered if not _LINE.fullmatch(each[1]))
                raise RecordError(f"{path}: line {number} is {line[:40]!r}, not `key<TAB>offset`; {AGAIN}")
            keys.append(table[:, 0].copy())
            offsets.append(table[:, 1].copy())
            lines += len(table)
    return (np.concatenate([np.empty(0, np.int64), *column]) for column in (keys, offsets))


def _parse_lines(text):
    """Keys and offsets, int64 [n, 2], of newline-terminated index lines; None if a line is malformed."""
    chars = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(chars < ord("0"))
    width = np.diff(ends, prepend=-1) - 1
    well_formed = (
        chars.max() <= ord("9")
        and len(ends) % 2 == 0
        and (chars[ends[0::2]] == ord("\t")).all()
        and (chars[ends[1::2]] == ord("\n")).all()
        and width.min() >= 1
        and width.max() <= 18  # fits int64
    )
    return np.fromstring(text, dtype=np.int64, sep=" ").reshape(-1, 2) if well_formed else None
