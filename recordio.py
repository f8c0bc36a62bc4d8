"""MXNet's indexed RecordIO, read and written without MXNet, byte for byte the same.

A `.rec` file is a sequence of records. A record is one part, or several if its payload contains the magic word:

    uint32 0xced7230a | uint32 (3 bits continuation flag, 29 bits length) | payload | zeros up to 4 bytes

The flag is 0 for a whole record; 1, 2 and 3 for its first, middle and last part. The writer splits at the magic word,
the reader puts it back. The `.idx` file has one line `key<TAB>offset` per record. The payload of an image record is an
`IRHeader` followed by the JPEG or PNG: see `pack`. All numbers are little-endian.
"""

import argparse
import mmap
import numbers
import os
import pathlib
import re
import shlex
import struct
from collections import namedtuple

import numpy as np
from tqdm import tqdm

from core.errors import UserError, report_errors
from core.files import atomic_write, open_temporary, publish

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_MAGIC_WORD = re.compile(re.escape(_MAGIC_BYTES))
_FRAME = struct.Struct("<II")
_IR = struct.Struct("<IfQQ")
_FRAME_AND_IR = struct.Struct("<IIIfQQ")
_MAX_PAYLOAD = 1 << 29  # the length field's 29 bits; MXNet's writer refuses payloads of this size and above
_AGAIN = "copy the index again, or delete it and write another with `python recordio.py index`"
_INDEX_LINE = re.compile(rb"[0-9]{1,18}\t[0-9]{1,18}")

IRHeader = namedtuple("IRHeader", ["flag", "label", "id", "id2"])
IRHeader.__doc__ = """Header of an image record: `label` is a float, or a float32 array [flag] where flag > 0."""


class RecordError(UserError, ValueError):
    """A damaged or inconsistent record file or index; the message names file, key and offset."""


def pack(header, payload):
    """Put an `IRHeader` (or a 4-tuple of its fields) before `payload`, as `mxnet.recordio.pack` does.

    A single label is stored in the header, with flag 0; n labels follow it as float32, with flag n. `header.flag` is
    ignored.
    """
    _, label, identity, identity2 = header
    if isinstance(label, numbers.Number):
        return _IR.pack(0, label, identity, identity2) + payload
    label = np.asarray(label, dtype="<f4")
    return _IR.pack(label.size, 0, identity, identity2) + label.tobytes() + payload


def unpack(buf):
    """Split a record's payload into `(IRHeader, image bytes)`, as `mxnet.recordio.unpack` does.

    Raises `RecordError` if `buf` is shorter than its header.
    """
    if len(buf) < _IR.size:
        raise RecordError(f"only {len(buf)} bytes long, the header of an image record alone takes {_IR.size}")
    header = IRHeader(*_IR.unpack_from(buf))
    start = _IR.size + 4 * header.flag
    if header.flag == 0:
        return header, buf[start:]
    if len(buf) < start:
        raise RecordError(f"the header declares {header.flag} labels, but the record is only {len(buf)} bytes long")
    return header._replace(label=np.frombuffer(buf, "<f4", header.flag, _IR.size).copy()), buf[start:]


def class_label(header):
    """The class of an image record, as stored in float32: its label, or the first of several."""
    return header.label if header.flag == 0 else float(header.label[0])


def index_path(path):
    """`x/train.rec` -> `x/train.idx`"""
    return pathlib.Path(path).with_suffix(".idx")


def _parse_index_lines(text):
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


def _read_index(path, block=1 << 23):
    """Keys and offsets, each int64 [n], in file order. Reads `block` bytes at a time."""
    tables, lines = [np.empty((0, 2), np.int64)], 0
    with open(path, "rb") as file:
        while text := file.read(block):
            text += file.readline(64)  # a longer line is malformed anyway
            text = text.replace(b"\r\n", b"\n")
            table = _parse_index_lines(text if text.endswith(b"\n") else text + b"\n")
            if table is None:
                numbered = enumerate(text.split(b"\n"), lines + 1)
                number, line = next(each for each in numbered if not _INDEX_LINE.fullmatch(each[1]))
                raise RecordError(f"{path}: line {number} is {line[:40]!r}, not `key<TAB>offset`; {_AGAIN}")
            tables.append(table)
            lines += len(table)
    table = np.concatenate(tables)
    return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])


class RecordReader:
    """Random access to the records of a `.rec` file by the keys of its `.idx`.

    The file is memory-mapped: memory use does not grow with it, and workers share its pages. Pickled by path. Every
    method raises `RecordError`, naming file, key and offset, rather than return a wrong record.

    idx_path: the index; by default `path` with the suffix `.idx`. `keys`: int64 [n], in index order.
    """

    def __init__(self, path, idx_path=None):
        self.path = pathlib.Path(path)
        self.idx_path = pathlib.Path(idx_path) if idx_path is not None else index_path(path)
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"{self.path}: no such file")
        if not os.path.exists(self.idx_path):
            command = f"python recordio.py index {shlex.quote(str(self.path))}"
            raise FileNotFoundError(f"{self.idx_path}: no such file; copy it there too, or write it: {command}")
        self.keys, offsets = _read_index(self.idx_path)
        order = None if (np.diff(self.keys) > 0).all() else np.argsort(self.keys, kind="stable")
        self._sorted_keys = self.keys if order is None else self.keys[order]
        self._offsets = offsets if order is None else offsets[order]
        repeated = np.flatnonzero(np.diff(self._sorted_keys) == 0)
        if len(repeated):
            key = self._sorted_keys[repeated[0]]
            raise RecordError(f"{self.idx_path}: duplicate key {key}; {_AGAIN}")
        self._first = int(self._sorted_keys[0]) if len(self.keys) else 0
        self._dense = len(self.keys) > 0 and int(self._sorted_keys[-1]) - self._first + 1 == len(self.keys)
        self._rows = len(self.keys)
        self._offset_list = memoryview(self._offsets)  # yields Python integers, faster than the array
        with open(self.path, "rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            self._end = self._size & ~3  # a payload that ends by here has its padding, too
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self._size else b""

    def __len__(self):
        return len(self.keys)

    def __contains__(self, key):
        return self._row(key) >= 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __reduce__(self):
        return type(self), (self.path, self.idx_path)

    def close(self):
        if self._map:
            self._map.close()

    def release(self):
        """Drop the pages read so far from this process, so that long scans do not grow its resident size."""
        if self._map and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def offset(self, key):
        """Byte offset of record `key`."""
        row = key - self._first if self._dense else self._row(key)
        if 0 <= row < self._rows:
            return self._offset_list[row]
        raise RecordError(f"{self.path}: key {key} is not in {self.idx_path.name}")

    def read(self, key):
        """The payload of record `key`, as bytes."""
        offset = self.offset(key)
        if not offset & 3 and offset + _FRAME.size <= self._end:  # fast path: nearly all records are one part
            magic, length = _FRAME.unpack_from(self._map, offset)
            stop = offset + 8 + length
            if magic == MAGIC and length < _MAX_PAYLOAD and stop <= self._end:
                return self._map[offset + 8 : stop]
        payload = bytearray()
        for start, stop in self._parts(key, offset):  # no list to join: it takes 88 bytes a part, however short
            payload += _MAGIC_BYTES + self._map[start:stop]
        return bytes(memoryview(payload)[4:])

    def read_record(self, key):
        """`(IRHeader, image bytes)` of record `key`."""
        payload = self.read(key)
        try:
            return unpack(payload)
        except RecordError as error:
            raise self._error(str(error), key) from None

    def read_image(self, key):
        """`(class label, image bytes)` of record `key`. The bytes are a uint8 array, usually a view of the mapped file:
        drop it before `close`.
        """
        offset = self.offset(key)
        if not offset & 3 and offset + _FRAME_AND_IR.size <= self._end:  # as in `read`
            magic, length, flag, label, _, _ = _FRAME_AND_IR.unpack_from(self._map, offset)
            if magic == MAGIC and flag == 0 and _IR.size <= length < _MAX_PAYLOAD and offset + 8 + length <= self._end:
                return label, np.frombuffer(self._map, np.uint8, length - _IR.size, offset + 32)
        header, payload = self.read_record(key)
        return class_label(header), np.frombuffer(payload, np.uint8)

    def read_labels(self, keys):
        """Class labels (see `class_label`) of many image records at once: float32 [len(keys)]."""
        keys = np.asarray(keys, np.int64)
        rows = keys - self._first if self._dense else np.searchsorted(self._sorted_keys, keys)
        rows = np.clip(rows, 0, max(len(self) - 1, 0))
        labels, plain = np.empty(len(keys), np.float32), np.zeros(len(keys), bool)
        if len(keys) and len(self):
            plain, labels[:] = self._plain_labels(self._offsets[rows])
            plain &= self._sorted_keys[rows] == keys
        for i in np.flatnonzero(~plain):  # in several parts, or damaged: read_record raises then
            labels[i] = class_label(self.read_record(int(keys[i]))[0])
        return labels

    def read_raw(self, key):
        """The bytes of record `key` in the file: frame, payload and padding (for `RecordWriter.write_raw`)."""
        offset = self.offset(key)
        for _, stop in self._parts(key, offset):  # noqa: B007  (the last one counts; a list of them could be large)
            pass
        return self._map[offset : stop + -stop % 4]

    def check(self):
        """Raise `RecordError` if the file ends before its last record does: truncated, or another file's index."""
        if len(self):
            self.read_raw(int(self._sorted_keys[np.argmax(self._offsets)]))

    def first_missing_key(self):
        """The smallest key missing from 0, 1, 2, ...; None if there is no gap."""
        wrong = np.flatnonzero(self._sorted_keys != np.arange(len(self)))
        return int(wrong[0]) if len(wrong) else None

    def _row(self, key):
        """Position of `key` among the sorted keys, -1 if absent."""
        row = int(np.searchsorted(self._sorted_keys, key))
        return row if row < self._rows and self._sorted_keys[row] == key else -1

    def _part(self, key, record_offset, offset):
        """`(continuation flag, start, stop)` of the payload of the part at `offset`, checked against the file size."""
        if offset % 4 or offset + _FRAME.size > self._size:
            raise self._error(f"no record can start at {offset} in a file of {self._size} bytes", key, record_offset)
        magic, length = _FRAME.unpack_from(self._map, offset)
        flag, length = length >> 29, length & (_MAX_PAYLOAD - 1)
        if magic != MAGIC:
            raise self._error(f"found {magic:#010x} at {offset} instead of {MAGIC:#010x}", key, record_offset)
        if flag not in ((0, 1) if offset == record_offset else (2, 3)):
            raise self._error(f"unexpected continuation flag {flag} at {offset}", key, record_offset)
        start, stop = offset + _FRAME.size, offset + _FRAME.size + length
        if stop + -stop % 4 > self._size:
            reason = f"{length} bytes from {start} run past the end of the file ({self._size} bytes): truncated?"
            raise self._error(reason, key, record_offset)
        return flag, start, stop

    def _parts(self, key, record_offset):
        """Yield `(start, stop)` of the payload of each part, in order."""
        offset, total, flag = record_offset, 0, None
        while flag not in (0, 3):
            flag, start, stop = self._part(key, record_offset, offset)
            offset = stop + -stop % 4
            total += stop - start + len(_MAGIC_BYTES)
            if total > _MAX_PAYLOAD + len(_MAGIC_BYTES):
                raise self._error("the parts together exceed the largest possible record", key, record_offset)
            yield start, stop

    def _plain_labels(self, offsets):
        """`(bool [n], labels [n])` of the records at `offsets`: is it a one-part image record, and if so its label."""
        words = np.frombuffer(self._map, "<u4", self._size // 4)
        inside = (offsets % 4 == 0) & (offsets + _FRAME.size + _IR.size <= self._size)
        at = np.where(inside, offsets // 4, 0)
        if len(words) < 8:
            return np.zeros(len(at), bool), 0.0
        length = words[at + 1].astype(np.int64)  # with flag 0 the whole word is the length
        many = words[at + 2].astype(np.int64)
        plain = inside & (words[at] == MAGIC) & (length >= _IR.size + 4 * many)
        plain &= (length < _MAX_PAYLOAD) & (offsets + _FRAME.size + length <= self._end)
        return plain, words[np.where(plain & (many > 0), at + 8, at + 3)].view("<f4")

    def _error(self, reason, key, offset=None):
        offset = self.offset(key) if offset is None else offset
        return RecordError(f"{self.path}: key {key} at offset {offset}: {reason}")


class RecordWriter:
    """Writes a `.rec` file and its `.idx`, which get their names in `close`; none if the `with` block raises."""

    def __init__(self, path, idx_path=None):
        self.path = pathlib.Path(path)
        self.idx_path = pathlib.Path(idx_path) if idx_path is not None else index_path(path)
        self._rec_part, self._rec = open_temporary(self.path)
        self._idx_part, self._idx = open_temporary(self.idx_path)
        self._position = 0
        self._last_key = -1
        self._out_of_order = False

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc):
        self.close() if kind is None else self.abort()

    def write(self, key, payload):
        """Append `payload` (bytes-like, less than 512 MiB) under the integer `key`, which must be new."""
        if not isinstance(payload, bytes):
            payload = memoryview(payload).tobytes()
        if len(payload) >= _MAX_PAYLOAD:
            raise RecordError(f"{self.path}: key {key}: {len(payload)} bytes, too long: the limit is 2**29 - 1")
        cuts = [word.start() for word in _MAGIC_WORD.finditer(payload) if word.start() % 4 == 0]
        begins, ends = [0, *(cut + len(_MAGIC_BYTES) for cut in cuts)], [*cuts, len(payload)]
        flags = [1, *[2] * (len(cuts) - 1), 3] if cuts else [0]
        record = b"".join(  # omits the magic word; the reader puts it back
            _FRAME.pack(MAGIC, flag << 29 | end - begin) + payload[begin:end]
            for flag, begin, end in zip(flags, begins, ends)
        )
        self.write_raw(key, record + bytes(-len(payload) % 4))

    def write_raw(self, key, record):
        """Append a whole record as returned by `RecordReader.read_raw`."""
        if not 0 <= key < 10**18:
            raise RecordError(f"{self.path}: key {key} is outside 0 to 10**18 - 1")
        self._out_of_order |= key <= self._last_key
        self._last_key = key
        self._idx.write(b"%d\t%d\n" % (key, self._position))
        self._rec.write(record)
        self._position += len(record)

    def close(self):
        """Give both files their final names. Raises `RecordError`, and discards both, if a key was written twice."""
        if self._rec.closed:
            return
        try:
            self._idx.flush()
            if self._out_of_order:
                keys = np.sort(_read_index(self._idx_part)[0])
                repeated = keys[1:][keys[1:] == keys[:-1]]
                if len(repeated):
                    raise RecordError(f"{self.path}: key {repeated[0]} was written more than once")
            # In this order a new .rec is never beside an old .idx.
            self.idx_path.unlink(missing_ok=True)
            publish(self._rec, self._rec_part, self.path)
            publish(self._idx, self._idx_part, self.idx_path)
        finally:
            self.abort()

    def abort(self):
        """Delete what has not got its final name."""
        for file, part in ((self._rec, self._rec_part), (self._idx, self._idx_part)):
            try:
                file.close()
            finally:
                part.unlink(missing_ok=True)


def write_index(path):
    """Write the `.idx` that a `.rec` has lost: keys 0, 1, 2, ... in file order, as MXNet's rec2idx.py gives them.

    Returns the number of records. Raises `RecordError`, and writes nothing, if there is an index already, or where the
    file is truncated or holds anything but records.
    """
    index, key, offset = index_path(path), 0, 0
    if index.exists():
        raise RecordError(f"{index}: exists already; delete it first if it is wrong")
    with (
        RecordReader(path, os.devnull) as reader,  # an index without keys
        atomic_write(index) as file,
        tqdm(total=reader._size, desc=index.name, unit="B", unit_scale=True, disable=None) as bar,
    ):
        while offset < reader._size:
            file.write(b"%d\t%d\n" % (key, offset))
            for _, stop in reader._parts(key, offset):  # noqa: B007
                pass
            bar.update(stop + -stop % 4 - offset)
            key, offset = key + 1, stop + -stop % 4
            if key % 4096 == 0:
                reader.release()
    return key


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the .idx of a .rec that has lost it.")
    parser.add_argument("command", choices=["index"])
    parser.add_argument("rec", help="such as dataset/ms1m-retinaface-t1/train.rec")
    rec = parser.parse_args().rec
    with report_errors():
        print(f"{index_path(rec)}: {write_index(rec)} records")
