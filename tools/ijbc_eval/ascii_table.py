"""Parse text tables of non-negative integers with NumPy: tens of millions of lines in seconds."""

import mmap
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tools.ijbc_eval.files import EvalError

MAX_DIGITS = 18  # the longest run of digits that always fits int64
CHUNK_BYTES = 8 << 20


def read_int_table(path, columns, layout, threads=2, chunk_bytes=CHUNK_BYTES):
    """Read lines of `columns` non-negative integers, separated by blanks or tabs.

    `layout` describes a line for error messages, e.g. "template template label".
    Returns int64 [lines, columns]; raises EvalError with file and line for a malformed line.
    An unterminated last line is accepted, and so are blank lines at the end; other blank lines are errors.
    """
    try:
        file = open(path, "rb")
    except OSError as error:
        raise EvalError(f"{path}: cannot be read ({error.strerror}); check -d DIR and -s SUBSET") from None
    with file:
        if file.seek(0, 2) == 0:
            raise EvalError(f"{path}: is empty; expected lines of `{layout}`")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            bounds = _line_chunks(buffer, chunk_bytes)
            with ThreadPoolExecutor(threads) as pool:
                parts = list(pool.map(lambda span: _parse_strict(buffer[span[0] : span[1]], columns), bounds))
            line = 0
            for position, (start, stop) in enumerate(bounds):
                if parts[position] is None:  # not the plain format: parse line by line
                    is_last = stop == len(buffer)
                    parts[position] = _parse_slowly(buffer[start:stop], columns, layout, path, line, is_last)
                line += len(parts[position])
    if line == 0:
        raise EvalError(f"{path}: has no data; expected lines of `{layout}`")
    return np.concatenate(parts)


def is_number(text):
    """Whether `text` (str or bytes) is a non-negative integer in ASCII digits that fits int64. str.isdigit alone also
    accepts characters like ², which int() rejects."""
    return text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS


def _line_chunks(buffer, chunk_bytes):
    bounds, start = [], 0
    while start < len(buffer):
        stop = min(start + chunk_bytes, len(buffer))
        if stop < len(buffer):
            newline = buffer.find(b"\n", stop - 1)
            stop = len(buffer) if newline < 0 else newline + 1
        bounds.append((start, stop))
        start = stop
    return bounds


def _parse_strict(text, columns):
    """Parse `int blank int … newline` lines without a Python loop over lines; None if any line differs."""
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n")
    if not text.endswith(b"\n"):
        text += b"\n"
    digits = np.frombuffer(text, np.uint8) - np.uint8(48)  # 0 … 9 for digits; everything else wraps to 10 or more
    ends = np.flatnonzero(digits > 9)
    if len(ends) % columns:
        return None
    ends = ends.reshape(-1, columns)
    marks = digits[ends]
    blank, tab, newline = (np.uint8((code - 48) % 256) for code in (32, 9, 10))
    if (marks[:, -1] != newline).any() or not ((marks[:, :-1] == blank) | (marks[:, :-1] == tab)).all():
        return None
    lengths = np.diff(ends.ravel(), prepend=-1).reshape(-1, columns) - 1
    if lengths.min() < 1 or lengths.max() > MAX_DIGITS:
        return None
    table = np.empty(ends.shape, np.int64)
    for column in range(columns):
        table[:, column] = _numbers(digits, ends[:, column], lengths[:, column])
    return table


def _numbers(digits, ends, lengths):
    """Values of the digit runs that end before `ends`: least significant digit first, shorter runs masked out."""
    longest = int(lengths.max())
    values = digits[ends - 1].astype(np.int32 if longest < 10 else np.int64)
    shortest = int(lengths.min())
    for place in range(1, longest):
        # Past the end of a shorter run any valid position will do: its digit is masked out.
        digit = digits[np.maximum(ends - 1 - place, 0)].astype(values.dtype)
        if place >= shortest:
            digit *= lengths > place
        digit *= 10**place
        values += digit
    return values


def _parse_slowly(text, columns, layout, path, first_line, is_last):
    rows = []
    lines = text.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if is_last:
        while lines and not lines[-1].strip():
            lines.pop()
    for number, line in enumerate(lines, first_line + 1):
        fields = line.split()
        if len(fields) != columns or not all(map(is_number, fields)):
            shown = line.decode("ascii", "backslashreplace").strip()
            raise EvalError(
                f"{path} line {number}: expected `{layout}` as non-negative integers, found {shown[:80]!r}; "
                "correct the line or download the file again"
            )
        rows.append([int(field) for field in fields])
    return np.array(rows, np.int64).reshape(-1, columns)
