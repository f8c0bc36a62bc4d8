"""insightface's verification sets (lfw.bin, cfp_fp.bin, agedb_30.bin, ...), read without running anything in them.

A .bin file is a pickle of `(images, same)`: 2·N encoded images and N booleans; images 2i and 2i+1 are pair i.

A pickle is a program for a stack machine that may call any function. Python's own unpickler can be denied that, but
not the rest: few bytes make it reserve 64 GB (a memo index of 2**32 - 2) or as much as a length field says, and build
what takes for ever to walk through (tuples that each hold the one before twice). So here is a machine that knows the
opcodes which Python 2 and 3 write for such a set, in the protocols 0 to 5, and no others. It calls nothing, walks
through nothing, and each opcode adds at most one value, whose bytes stand in the file: time and memory are bounded
by the file's size. What the opcodes do is described in the standard library's pickletools.py.
"""

import codecs
import mmap
import os
import pathlib
import pickletools
import re

import numpy as np

from core.errors import UserError

_DEPTH = 8  # of marks inside each other; the picklers need 3
_LISTS = 2
_ENCODE = object()  # the function _codecs.encode: how Python 3 writes bytes in the protocols 0 to 2
_NOTHING = object()  # in a place of the memo to which nothing was put
_UNKNOWN_ESCAPE = re.compile(rb"""\\(?!["'tnr]|x[0-9a-f]{2})""")  # in a repr of Python 2, pairs of \ taken out


class VerificationError(UserError):
    """A .bin set that is missing or damaged; the message names the file."""


def read_bin(path):
    """Read a .bin set without running any code in it, in time and memory bounded by the file's size.

    Returns `(images, same)`: a list of 2·N encoded images (bytes) and a bool array [N]. Raises VerificationError.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise VerificationError(f"{path}: no such verification set; put it there, or take it out of val_targets")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise ValueError("it is empty")
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                images, same = _checked(_Machine(data).run())
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise VerificationError(f"{path}: not a verification set: {error}; copy it again or write it anew") from None
    return images, np.array(same, dtype=bool)


def _checked(content):
    """`(images, same)` where the pickle's content is just that; else a ValueError."""
    if type(content) is not tuple or [type(part) for part in content] != [list, list]:
        raise ValueError("it holds no pair of lists")
    images, same = content
    for name, values, kind in (("image", images, bytes), ("entry of the second list", same, bool)):
        wrong = next((position for position, value in enumerate(values) if type(value) is not kind), None)
        if wrong is not None:
            raise ValueError(f"{name} {wrong} is not {'bytes' if kind is bytes else 'a boolean'}")
    if len(images) != 2 * len(same) or not same:
        raise ValueError(f"it must hold 2·N images and N booleans, N > 0, not {len(images)} and {len(same)}")
    return images, same


class _Text:
    """A str of the pickle, kept as the bytes that it stands for: to encode it again and again makes no copies."""

    __slots__ = ("data",)

    def __init__(self, data):
        self.data = data


class _Machine:
    """Runs the pickle in `data` (bytes or a mapped file). Its values: bytes, _Text, booleans, lists, pairs, _ENCODE."""

    def __init__(self, data):
        self.data, self.size, self.at = data, len(data), 0
        self.stack, self.below = [], []  # the values since the last mark; those before it, a list for each mark
        self.memo, self.memoized = [], 0
        self.lists = self.frame_end = 0

    def run(self):
        """What the pickle stands for; bytes behind its end are left alone. Raises ValueError."""
        begin = 0
        try:
            while (opcode := self.take(1)) != b".":
                if opcode not in _OPCODES:
                    raise ValueError(f"{_name(opcode)} has no place in one")
                _OPCODES[opcode](self)
                if begin < self.frame_end < self.at:
                    raise ValueError(f"{_name(opcode)} goes beyond its frame")
                begin = self.at
            return self.pop()
        except ValueError as error:
            raise ValueError(f"{error} (at byte {begin} of {self.size})") from None

    # --- the file ---------------------------------------------------------------------------------------------------

    def take(self, count):
        stop = self.at + count
        if stop > self.size:
            raise ValueError("it ends too early")
        data, self.at = self.data[self.at:stop], stop
        return data

    def number(self, width):
        return int.from_bytes(self.take(width), "little")

    def line(self):
        end = self.data.find(b"\n", self.at)
        line = self.take((end if end >= 0 else self.size) - self.at)
        self.take(1)
        return line

    def decimal(self):
        line = self.line()
        if not re.fullmatch(rb"[0-9]{1,9}", line):
            raise ValueError(f"{line[:20]!r} is no number")
        return int(line)

    # --- the stack --------------------------------------------------------------------------------------------------

    def top(self, kind=object):
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"what should be a {kind.__name__} is none")
        return self.stack[-1]

    def pop(self, kind=object):
        value = self.top(kind)
        self.stack.pop()
        return value

    def mark(self):
        if len(self.below) == _DEPTH:
            raise ValueError("it is nested too deeply")
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self):
        if not self.below:
            raise ValueError("a mark lacks")
        values, self.stack = self.stack, self.below.pop()
        return values

    # --- the opcodes ------------------------------------------------------------------------------------------------

    def protocol(self):
        if self.number(1) > 5:
            raise ValueError("its pickle protocol is unknown")

    def frame(self):
        """A pickler's block, which has only whole opcodes in it (PEP 3154)."""
        if self.frame_end >= self.at:
            raise ValueError("a frame begins in another one")
        length = self.number(8)
        if length > self.size - self.at:
            raise ValueError("it ends too early")
        self.frame_end = self.at + length

    def put(self, index):
        """A pickler counts its memo up from 0 or 1, in the file so far: there is a byte for each place."""
        if index > self.at:
            raise ValueError(f"memo index {index} is out of turn")
        self.memo += [_NOTHING] * (index + 1 - len(self.memo))
        self.memoized += self.memo[index] is _NOTHING
        self.memo[index] = self.top()

    def get(self, index):
        value = self.memo[index] if index < len(self.memo) else _NOTHING
        if value is _NOTHING:
            raise ValueError(f"memo index {index} is empty")
        self.stack.append(value)

    def new_list(self, values):
        self.lists += 1
        if self.lists > _LISTS:
            raise ValueError(f"it has more than {_LISTS} lists")
        self.stack.append(values)

    def new_pair(self, values):
        if len(values) != 2:
            raise ValueError(f"it has a tuple of {len(values)}")
        self.stack.append(tuple(values))

    def extend(self, values):
        self.top(list).extend(values)

    def sized(self, width):
        """Bytes after a length of `width` bytes."""
        self.stack.append(self.take(self.number(width)))

    def quoted(self):
        """A str of Python 2 in protocol 0, as its repr wrote it."""
        line = self.line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise ValueError("a string has no quotes")
        if _UNKNOWN_ESCAPE.search(line.replace(rb"\\", b"")):
            raise ValueError("a string has an unknown escape")
        self.stack.append(codecs.escape_decode(line[1:-1])[0])

    def text(self, data, encoding, errors="strict"):
        self.stack.append(_Text(str(data, encoding, errors).encode("latin-1")))

    def boolean(self, data):
        if data not in (b"0", b"1", b"00", b"01", b"\0", b"\1"):
            raise ValueError(f"the number {data[:20]!r} is no boolean")
        self.stack.append(data[-1:] in b"1\1")

    def named(self, module, name):
        if (module, name) != (b"_codecs", b"encode"):
            name = f"{str(module[:60], 'ascii', 'replace')}.{str(name[:60], 'ascii', 'replace')}"
            raise ValueError(f"it asks for {name}, which has no place in one")
        self.stack.append(_ENCODE)

    def call(self):
        arguments = self.pop(tuple)
        if self.pop() is not _ENCODE or [type(value) for value in arguments] != [_Text, _Text] \
                or arguments[1].data != b"latin1":
            raise ValueError("it calls what it may not")
        self.stack.append(arguments[0].data)


def _name(opcode):
    known = pickletools.code2op.get(str(opcode, "latin-1"))
    return f"the opcode {known.name}" if known else f"the byte {opcode!r}"


_OPCODES = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"(": _Machine.mark,
    b"p": lambda m: m.put(m.decimal()),
    b"q": lambda m: m.put(m.number(1)),
    b"r": lambda m: m.put(m.number(4)),
    b"\x94": lambda m: m.put(m.memoized),
    b"g": lambda m: m.get(m.decimal()),
    b"h": lambda m: m.get(m.number(1)),
    b"j": lambda m: m.get(m.number(4)),
    b"]": lambda m: m.new_list([]),
    b"l": lambda m: m.new_list(m.pop_mark()),
    b"a": lambda m: m.extend([m.pop()]),
    b"e": lambda m: m.extend(m.pop_mark()),
    b"t": lambda m: m.new_pair(m.pop_mark()),
    b"\x86": lambda m: m.new_pair([m.pop(), m.pop()][::-1]),
    b"S": _Machine.quoted,
    b"U": lambda m: m.sized(1),
    b"T": lambda m: m.sized(4),
    b"C": lambda m: m.sized(1),
    b"B": lambda m: m.sized(4),
    b"\x8e": lambda m: m.sized(8),
    b"V": lambda m: m.text(m.line(), "raw-unicode-escape"),
    b"X": lambda m: m.text(m.take(m.number(4)), "utf-8", "surrogatepass"),
    b"\x8c": lambda m: m.text(m.take(m.number(1)), "utf-8", "surrogatepass"),
    b"I": lambda m: m.boolean(m.line()),
    b"K": lambda m: m.boolean(m.take(1)),
    b"\x88": lambda m: m.boolean(b"1"),
    b"\x89": lambda m: m.boolean(b"0"),
    b"c": lambda m: m.named(m.line(), m.line()),
    b"\x93": lambda m: m.named(*(text.data for text in [m.pop(_Text), m.pop(_Text)][::-1])),
    b"R": _Machine.call,
}
