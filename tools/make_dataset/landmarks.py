"""A detector's file of five landmarks an image: a line an image, found by the image's name.

As IJB's, `name x1 y1 … x5 y5 score`, the name may contain spaces; or, if the file is called *.csv, comma-separated
`name,x1,y1,…,x5,y5` with any columns behind, and with or without a header. Points: eyes, nose, mouth corners, each from
left to right in the picture, pixels of the image as it is displayed (EXIF orientation applied).
"""

import array
import csv
import functools
import hashlib
import mmap
import os
import pathlib

import numpy as np

from core.errors import UserError
from tools.ijbc_eval.align import MISFIT, misfit

_TRIED = 1000  # lines whose points are tried as a face before hours of work


class LandmarkError(UserError):
    """A landmark file that cannot be used; the message names the line."""


class Landmarks:
    """The landmarks of a file, `[name]`: float64 [5, 2], or None. 16 bytes of memory a line; pickled by path.

    name: bytes, the image's path below ROOT with "/". Raises LandmarkError for a malformed line, a name listed twice,
    and where most of the first 1,000 lines have points unlike an upright face: in another order, or turned.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.split = _split_csv if self.path.suffix.lower() == ".csv" else _split_ijb
        hashes, offsets, tried, offset = array.array("Q"), array.array("q"), [], 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                entry = self._entry(line, number)
                if entry is not None:
                    hashes.append(_hash(entry[0]))
                    offsets.append(offset)
                    if len(tried) < _TRIED:
                        tried.append(entry[1])
                offset += len(line)
        if not tried:
            raise LandmarkError(f"{self.path}: no line of landmarks; expected lines of `name x1 y1 … x5 y5 score`")
        apart = misfit(np.array(tried)) > MISFIT
        if 2 * apart.sum() > len(apart):
            raise LandmarkError(
                f"{self.path}: {apart.sum()} of the first {len(apart)} lines have points unlike an upright face; write "
                "them in the order eyes, nose, mouth corners, each from left to right, x before y, in pixels of the "
                "picture as displayed (EXIF orientation applied)"
            )
        hashes = np.frombuffer(hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._offsets = hashes[order], np.frombuffer(offsets, np.int64)[order]
        self._refuse_repeated()

    def __getitem__(self, name):
        row = int(np.searchsorted(self._hashes, np.uint64(_hash(name))))
        if row == len(self._hashes) or self._hashes[row] != _hash(name):
            return None
        found, points = self._entry_at(row)
        return points if found == name else None

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_bytes"}

    @functools.cached_property
    def _bytes(self):
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _entry_at(self, row):
        start = int(self._offsets[row])
        end = self._bytes.find(b"\n", start)
        return self._entry(self._bytes[start : end if end >= 0 else None])

    def _entry(self, line, number=None):
        """`(name, points)` of a line; None for a blank one or a csv's header."""
        try:
            fields = self.split(line)
            if not fields:
                return None
            name, *values = fields
            points = np.array(values[:10], np.float64).reshape(5, 2)
            if not np.isfinite(points).all() or not np.ptp(points, axis=0).any():
                raise ValueError
        except ValueError:
            if number == 1 and self.split is _split_csv:
                return None
            raise LandmarkError(
                f"{self.path} line {number}: expected a name and five points (`name x1 y1 … x5 y5 score`, or "
                f"comma-separated in a .csv), found {line.strip()[:80]!r}"
            ) from None
        return name.removeprefix(b"./"), points

    def _refuse_repeated(self):
        for row in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]):
            name = self._entry_at(row)[0]
            if name == self._entry_at(row + 1)[0]:
                raise LandmarkError(f"{self.path}: {os.fsdecode(name)} is listed more than once; keep one of the lines")


def _split_ijb(line):
    fields = line.strip().rsplit(None, 11)
    if fields and len(fields) != 12:
        raise ValueError
    return fields


def _split_csv(line):
    fields = next(csv.reader([line.decode("utf-8-sig", "surrogateescape").strip()]), [])
    return [os.fsencode(field) if place == 0 else field for place, field in enumerate(fields)]


def _hash(name):
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
