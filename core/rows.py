"""Rows of a binary file by system calls.

Through a memory map a truncated file or a failing disk kills the process with SIGBUS, and each uncached row costs
128 KB of readahead.
"""

import os

import numpy as np


def read_at(file, memory, offset):
    """Fill `memory`, a writable memoryview of bytes, from `offset` of a descriptor; returns how many bytes there were.

    They are fewer only where the file ends: network disks may return less than asked for. Raises OSError.
    """
    done = 0
    while done < len(memory) and (read := os.preadv(file, [memory[done:]], offset + done)):
        done += read
    return done


def read_rows(file, begin, rows, values, fail):
    """Fill `values` [B, …], contiguous, with the rows int64 [B] of a file in which row 0 begins at byte `begin`.

    Consecutive rows are read at once. fail: called with `(row, why)` of a row that cannot be read, to raise an error;
    why is the system's message, or None where the file ends before the end of the row.
    """
    size = values[:1].nbytes
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1).tolist()
    runs = [(int(rows[start]), start * size, stop * size) for start, stop in zip(starts, [*starts[1:], len(rows)])]
    if hasattr(os, "posix_fadvise"):
        for row, first, last in runs:  # all requests reach the disk at once
            os.posix_fadvise(file, begin + row * size, last - first, os.POSIX_FADV_WILLNEED)
    memory = memoryview(values.reshape(-1).view(np.uint8))
    for row, first, last in runs:
        why = None
        try:
            done = read_at(file, memory[first:last], begin + row * size)
        except OSError as error:
            done, why = 0, error.strerror
        if done < last - first:
            fail(row + done // size, why)
