"""insightface's verification sets (lfw.bin, cfp_fp.bin, agedb_30.bin, ...), read without running code in them.

A .bin file is a pickle of `(images, same)`: 2·N encoded images and N booleans; images 2i and 2i+1 are pair i. A pickle
can call any function, so it is read by the standard library's pure-Python unpickler with two allow-lists: opcodes, and
the few names that plain data needs, mapped to functions of this module. None of them duplicates the file's data, and
opcodes are counted: memory and time stay proportional to the file size.
"""

import contextlib
import mmap
import os
import pathlib
import pickle
import re

import numpy as np

from core.errors import UserError

# What Python 2 and 3 write for bytes, booleans, numbers, lists, tuples and NumPy arrays of these.
# No dicts or sets: hashing a deeply nested key would overflow the stack.
_OPCODES = """
    PROTO FRAME STOP MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE INT BININT BININT1
    BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    UNICODE BINUNICODE SHORT_BINUNICODE EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GLOBAL
    STACK_GLOBAL REDUCE BUILD
""".split()


class VerificationError(UserError):
    """A missing or damaged .bin set; the message names the file."""


class _NotASet(Exception):
    """Why the content is refused."""


def read_bin(path):
    """Read a .bin set without running any code in it.

    Returns `(images, same)`: a list of 2·N encoded images (bytes) and a bool array [N]. In the file, lists may also be
    tuples or NumPy arrays, images bytearrays, uint8 arrays or lists of numbers, booleans 0 or 1. Raises
    VerificationError.
    """
    path = pathlib.Path(path)
    if not os.path.isfile(path):
        raise VerificationError(f"{path}: no such verification set; copy it there or remove it from val_targets")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise _NotASet("it is empty")
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                return _checked(_Unpickler(data, size).load())
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read ({error.strerror}); check path and disk") from None
    except _NotASet as error:
        why = str(error)
    except Exception as error:  # anything that damaged data makes the unpickler raise
        why = f"it is truncated or damaged ({' '.join(f'{type(error).__name__}: {error}'.split())[:100]})"
    raise VerificationError(f"{path}: not a verification set: {why}; copy or rewrite it")


def _checked(content):
    """`(images, same)` as `read_bin` returns them. Checks types only: nested content could be endless."""
    content = _values(content)
    if type(content) not in (tuple, list) or len(content) != 2:
        raise _NotASet("it is not a pair of lists")
    images, same = map(_values, content)
    same = list(same) if type(same) is bytes else same
    if type(images) not in (tuple, list) or type(same) not in (tuple, list):
        raise _NotASet("it is not a pair of lists")
    if len(images) != 2 * len(same) or not same:
        raise _NotASet(f"it needs 2·N images and N booleans, N > 0, not {len(images)} and {len(same)}")
    for position, value in enumerate(same):
        if type(value) not in (bool, int, float) or value not in (0, 1):
            raise _NotASet(f"pair {position} has no boolean")
    once = {}  # an image that occurs again takes neither time nor memory
    for position, image in enumerate(images):
        if id(image) not in once:
            once[id(image)] = _bytes(image, position)
    return [once[id(image)] for image in images], np.array(same, dtype=bool)


def _values(part):
    """The list in a pickled array; anything else as it is."""
    return part.values() if type(part) is _Array else part


def _bytes(image, position):
    if type(image) is _Array and (image.dtype == "u1" or image.dtype[0] == "S"):
        image = image.data
    if type(image) in (tuple, list):  # of numbers
        with contextlib.suppress(TypeError, ValueError):
            return bytes(image)
    if type(image) is not bytes:
        raise _NotASet(f"image {position} is not bytes")
    return image


class _Array:
    """A pickled NumPy array: `data` is its bytes, or a list for an array of objects."""

    def __init__(self, data=None, dtype="", shape=(), *_):
        self.data, self.dtype, self.shape = data, dtype, shape

    def values(self):
        if type(self.data) is list:
            return self.data
        if self.dtype == "u1" and len(self.shape) == 2:  # a row is an image
            return [self.data[at : at + self.shape[1]] for at in range(0, len(self.data), self.shape[1])]
        return np.frombuffer(self.data, _dtype(self.dtype)).tolist()


def _dtype(name, *_):
    name = name.decode() if type(name) is bytes else name
    if not re.fullmatch(r"b1|[ui][1248]|f[248]|S[0-9]{1,9}|O[48]?", name):
        raise _NotASet(f"it has a NumPy array of dtype {name[:20]}")
    return name


def _scalar(dtype, data):
    return data if dtype[0] == "S" else _Array(data[:8], dtype).values()[0]


def _encoder(left):
    """A replacement of `_codecs.encode`, bytearray and bytes for at most `left` characters in all."""

    def encode(data=b"", encoding=None):
        nonlocal left
        if type(data) is bytes:
            return data
        if type(data) is not str or encoding not in ("latin1", "latin-1", b"latin-1"):
            raise _NotASet("it makes a call that is not allowed")
        left -= len(data)  # repeating the same text could take more memory than the file
        if left < 0:
            raise _NotASet("it is larger than its file")
        return data.encode("latin-1")

    return encode


class _Unpickler(pickle._Unpickler):
    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES}

    def __init__(self, file, size):
        super().__init__(file, encoding="bytes")  # a str of Python 2 is bytes
        # A list of small numbers takes an opcode for two bytes.
        self.dispatch = _Counted(self.dispatch, 10_000 + size * 5 // 8)
        self.encode = _encoder(size)

    def find_class(self, module, name):
        known = {
            "_codecs.encode": self.encode,  # bytes of Python 3 in protocols 0 to 2
            "builtins.bytearray": self.encode,
            "builtins.bytes": self.encode,
            "numpy.ndarray": None,
            "numpy.dtype": _dtype,
            "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
            "numpy.core.numeric._frombuffer": _Array,
            "numpy.core.multiarray.scalar": _scalar,
        }
        name = f"{module}.{name}".replace("__builtin__.", "builtins.").replace("numpy._core.", "numpy.core.")
        if name not in known:
            raise _NotASet(f"it refers to {name[:60]!r:.100}, which is not allowed")
        return known[name]

    def load_build(self):
        state, part = self.stack.pop(), self.stack[-1]
        if type(part) is _Array:
            _, part.shape, part.dtype, _, part.data = state
        elif type(part) is not str:  # the name of a dtype, whose state is its byte order
            raise _NotASet("it sets an object's state")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = pickle._Unpickler.load_binbytes8  # Python's own allocates the declared length


class _Counted(dict):
    """The allowed opcodes; a file may have `left` in all."""

    def __init__(self, opcodes, left):
        super().__init__(opcodes)
        self.left = left

    def __getitem__(self, code):
        self.left -= 1
        if self.left < 0:
            raise _NotASet("it has too many opcodes for its size")
        if code not in self:
            raise _NotASet(f"the pickle opcode {bytes([code])} is not allowed")
        return super().__getitem__(code)
