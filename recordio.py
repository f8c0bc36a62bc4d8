"""MXNet's indexed RecordIO, read and written without MXNet, byte for byte the same.

A `.rec` file is a sequence of records. A record is one part, or several if its payload contains the magic word:

    uint32 0xced7230a | uint32 (3 bits continuation flag, 29 bits length) | payload | zeros up to 4 bytes

The flag is 0 for a whole record; 1, 2 and 3 for its first, middle and last part. The writer splits at the magic word,
the reader puts it back. The `.idx` file has one line `key<TAB>offset` per record. The payload of an image record is an
`IRHeader` followed by the JPEG or PNG: see `pack`. All numbers are little-endian.
"""

import argparse
import numbers
import os
import pathlib
import re
import shlex
import struct
import weakref
from collections import namedtuple

import numpy as np
from tqdm import tqdm

from core.errors import report_errors
from core.files import atomic_write, open_temporary, publish
from record_index import RecordError, binary_path, index_path, open_index, read_lines

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_MAGIC_WORD = re.compile(re.escape(_MAGIC_BYTES))
_FRAME = struct.Struct("<II")
_IR = struct.Struct("<IfQQ")
_FRAME_AND_IR = struct.Struct("<IIIfQQ")
_MAX_PAYLOAD = 1 << 29  # the length field's 29 bits; MXNet's writer refuses payloads of this size and above
_USUAL = 1 << 16  # bytes read at once at most, where the index does not tell the length of a record
_HEAD = 36  # bytes from the start of a one-part image record to its first label, in the header or behind it

IRHeader = namedtuple("IRHeader", ["flag", "label", "id", "id2"])
IRHeader.__doc__ = """Header of an image record: `label` is a float, or a float32 array [flag] where flag > 0."""


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


class RecordReader:
    """Random access to the records of a `.rec` file by the keys of its `.idx`.

    Reads by system calls: memory use does not grow with the file, and a file cut meanwhile is an error (core/rows.py).
    Pickled by path. Every method raises `RecordError`, naming file, key and offset, rather than return a wrong record.

    idx_path: the index; by default `path` with the suffix `.idx`. `index`: its RecordIndex.
    """

    def __init__(self, path, idx_path=None):
        self.path = pathlib.Path(path)
        self.idx_path = pathlib.Path(idx_path) if idx_path is not None else index_path(path)
        if self.path.suffix == ".idx":
            raise RecordError(f"{path}: is an index; give the .rec file beside it")
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"{self.path}: no such file")
        if not os.path.exists(self.idx_path):
            command = f"python recordio.py index {shlex.quote(str(self.path))}"
            raise FileNotFoundError(f"{self.idx_path}: no such file; copy it there too, or write it: {command}")
        self.index = open_index(self.idx_path)
        self._file = os.open(self.path, os.O_RDONLY)
        self._closed = weakref.finalize(self, os.close, self._file)
        self._size = os.fstat(self._file).st_size
        self._usual = min(_USUAL, self._size)
        self._end = self._size & ~3  # a payload that ends by here has its padding, too

    @property
    def keys(self):
        """int64 [n], in index order."""
        keys = self.index.keys
        return np.arange(keys.start, keys.stop) if isinstance(keys, range) else keys[:]

    def __len__(self):
        return self.index.count

    def __contains__(self, key):
        return 0 <= self.index.row(key) < self.index.count

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __reduce__(self):
        return type(self), (self.path, self.idx_path)

    def close(self):
        self._closed()

    def offset(self, key):
        """Byte offset of record `key`."""
        return self._place(key)[0]

    def read(self, key):
        """The payload of record `key`, as bytes."""
        offset, data = self._fetch(key)
        if not offset & 3 and len(data) >= _FRAME.size:  # fast path: nearly all records are one part
            magic, length = _FRAME.unpack_from(data)
            stop = 8 + length
            if magic == MAGIC and length < _MAX_PAYLOAD and stop <= len(data) and offset + stop <= self._end:
                return data[8:stop]
        payload = bytearray()
        for start, stop in self._parts(key, offset):  # no list to join: it takes 88 bytes a part, however short
            payload += _MAGIC_BYTES + self._bytes(start, stop - start)
        return bytes(memoryview(payload)[4:])

    def read_record(self, key):
        """`(IRHeader, image bytes)` of record `key`."""
        payload = self.read(key)
        try:
            return unpack(payload)
        except RecordError as error:
            raise self._error(str(error), key) from None

    def read_image(self, key):
        """`(class label, image bytes)` of record `key`. The bytes are a uint8 array, read-only."""
        offset, data = self._fetch(key)
        if not offset & 3 and len(data) >= _FRAME_AND_IR.size:  # as in `read`
            magic, length, flag, label, _, _ = _FRAME_AND_IR.unpack_from(data)
            stop = 8 + length
            whole = _IR.size <= length < _MAX_PAYLOAD and stop <= len(data) and offset + stop <= self._end
            if magic == MAGIC and flag == 0 and whole:
                return label, np.frombuffer(data, np.uint8, length - _IR.size, 32)
        header, payload = self.read_record(key)
        return class_label(header), np.frombuffer(payload, np.uint8)

    def read_labels(self, keys):
        """Class labels (see `class_label`) of many image records at once: float32 [len(keys)]."""
        keys = np.asarray(keys, np.int64)
        labels, plain = np.empty(len(keys), np.float32), np.zeros(len(keys), bool)
        if len(keys) and len(self):
            offsets, found = self.index.offsets_of(keys)
            plain, labels[:] = self._plain_labels(offsets)
            plain &= found
        for i in np.flatnonzero(~plain):  # in several parts, or damaged: read_record raises then
            labels[i] = class_label(self.read_record(int(keys[i]))[0])
        return labels

    def read_raw(self, key):
        """The bytes of record `key` in the file: frame, payload and padding (for `RecordWriter.write_raw`)."""
        offset = self.offset(key)
        for _, stop in self._parts(key, offset):  # noqa: B007  (the last one counts; a list of them could be large)
            pass
        return self._bytes(offset, stop + -stop % 4 - offset)

    def check(self):
        """Raise `RecordError` if the file ends before its last record does: truncated, or another file's index."""
        if len(self):
            self.read_raw(self.index.facts["last"])

    def first_missing_key(self):
        """The smallest key missing from 0, 1, 2, ...; None if there is no gap."""
        return self.index.facts["missing"]

    def _place(self, key):
        """`(offset, length)` of record `key`, the length as far as the offset of the next key tells."""
        row = self.index.row(key)
        if 0 <= row < self.index.count:
            offset, following = self.index.pair(row)
            return offset, following - offset if 0 < following - offset < self._usual else self._usual
        raise RecordError(f"{self.path}: key {key} is not in {self.idx_path.name}")

    def _fetch(self, key):
        """`(offset, bytes from there on)` of record `key`, usually the whole of it."""
        offset, length = self._place(key)
        return offset, self._pread(offset, length)

    def _pread(self, offset, size):
        """At most `size` bytes from `offset`."""
        try:
            return os.pread(self._file, size, offset)
        except OSError as error:
            raise RecordError(f"{self.path}: cannot be read at {offset} ({error.strerror}); check the disk") from None

    def _bytes(self, offset, size):
        """`size` bytes from `offset`, which the file had when it was opened."""
        data = self._pread(offset, size)
        while len(data) < size:  # network disks may return less than asked for
            if not (more := self._pread(offset + len(data), size - len(data))):
                raise RecordError(f"{self.path}: {offset + len(data)} bytes, but {self._size} when it was opened")
            data += more
        return data

    def _part(self, key, record_offset, offset):
        """`(continuation flag, start, stop)` of the payload of the part at `offset`, checked against the file size."""
        if offset % 4 or offset + _FRAME.size > self._size:
            raise self._error(f"no record can start at {offset} in a file of {self._size} bytes", key, record_offset)
        magic, length = _FRAME.unpack(self._bytes(offset, _FRAME.size))
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
        first, last = int(offsets.min()), int(offsets.max()) + _HEAD
        if last - first <= _USUAL * len(offsets) and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, first, last - first, os.POSIX_FADV_WILLNEED)  # else one request a record
        heads = b"".join(self._pread(offset, _HEAD).ljust(_HEAD, b"\0") for offset in offsets.tolist())
        words = np.frombuffer(heads, "<u4").reshape(len(offsets), -1)
        magic, length, many = words[:, :3].T.astype(np.int64)  # with flag 0 the whole word is the length
        plain = (offsets % 4 == 0) & (magic == MAGIC) & (length >= _IR.size + 4 * many)
        plain &= (length < _MAX_PAYLOAD) & (offsets + _FRAME.size + length <= self._end)
        return plain, np.where(many > 0, words[:, 8], words[:, 3]).view("<f4")

    def _error(self, reason, key, offset=None):
        offset = self.offset(key) if offset is None else offset
        return RecordError(f"{self.path}: key {key} at offset {offset}: {reason}")


class RecordWriter:
    """Writes a `.rec` file and its `.idx`, which get their names in `close`; none if the `with` block raises."""

    def __init__(self, path, idx_path=None):
        self.path = pathlib.Path(path)
        self.idx_path = pathlib.Path(idx_path) if idx_path is not None else index_path(path)
        self._rec_part, self._rec = open_temporary(self.path)
        try:
            self._idx_part, self._idx = open_temporary(self.idx_path)
        except OSError:
            self._rec.close()
            self._rec_part.unlink()
            raise
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
                keys = np.sort(next(read_lines(self._idx_part)))
                repeated = keys[1:][keys[1:] == keys[:-1]]
                if len(repeated):
                    raise RecordError(f"{self.path}: key {repeated[0]} was written more than once")
            # In this order a new .rec is never beside an old .idx.
            for path in (self.idx_path, binary_path(self.idx_path)):
                path.unlink(missing_ok=True)
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
    return key


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the .idx of a .rec that has lost it.")
    parser.add_argument("command", choices=["index"])
    parser.add_argument("rec", help="such as dataset/ms1m-retinaface-t1/train.rec")
    rec = parser.parse_args().rec
    with report_errors():
        print(f"{index_path(rec)}: {write_index(rec)} records")
