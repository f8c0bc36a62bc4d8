"""The old model's features of a training set: reads the rows of a batch and checks their labels.

old_model/feature_set.py lists the files and the commands that write them. The loader's workers read the rows of the
images that they decode (engine/loader.py), so a method finds them in its batch.
"""

import os
import pathlib
import weakref

import numpy as np

from old_model.feature_set import FeatureError, label_path, open_array, rewrite, rewrite_from_images

LABELS_SAMPLED = 1024  # rows whose labels are compared with the record file on opening


class OldFeatures:
    """The old model's features, labels and credible flags of every image of a training set.

    train_set: a data set of dataset.py; row i of every file belongs to its image i. Lengths and an even sample of the
        labels are checked here, all labels batch by batch (`compare_labels`).
    feature_path: …_feature.npy, float [N, D]. labels_path: int [N]; "" or None = the …_label.npy beside it.
    credible_path: bool [N], such as …_credible_ratio_90_feature.npy; "" or None = every row is credible.
    embedding_size: the new model's; None = any.

    `features` and `labels` are RowFiles: nothing is read before it is needed, and a file cut meanwhile is an error.
    Raises FeatureError, with the command to run, for files that are missing or of another training set;
    old_model/provenance.py compares their manifests.
    """

    def __init__(self, train_set, feature_path, labels_path=None, credible_path=None, embedding_size=None):
        if not feature_path:
            raise FeatureError("old_embedding is empty; set it in the config to a …_feature.npy of get_feature.py")
        self.path, self.record = pathlib.Path(feature_path), train_set.path
        labels_path = pathlib.Path(labels_path or label_path(feature_path))
        self.features, self.labels = RowFile(self.path, 2, np.floating), RowFile(labels_path, 1, np.integer)
        self.width = self.features.shape[1]
        self._credible = RowFile(credible_path, 1, np.bool_) if credible_path else None
        for file in filter(None, (self.features, self.labels, self._credible)):
            if len(file) != len(train_set):
                remedy = rewrite_from_images(file.path) if file is self._credible else rewrite(self.path)
                raise FeatureError(
                    f"{file.path}: {len(file)} rows, but {self.record} has {len(train_set)} images: "
                    f"made from another record file; {remedy}"
                )
        if embedding_size is not None and self.width != embedding_size:
            raise FeatureError(
                f"{self.path}: features of width {self.width}, but embedding_size is {embedding_size}; "
                "set embedding_size to the old model's, or use the features of an old model of that width; "
                f"if the old model has changed, {rewrite(self.path)}"
            )
        if self._credible and not self._credible.array.any():
            raise FeatureError(f"{credible_path}: no row is credible; {rewrite(credible_path)}")
        rows = np.unique(np.linspace(0, len(train_set) - 1, LABELS_SAMPLED).astype(np.int64)) if len(train_set) else []
        self.compare_labels(rows, [train_set.label(int(row)) for row in rows])

    def __len__(self):
        return len(self.features)

    def compare_labels(self, rows, labels):
        """Raise FeatureError if a row's stored class differs from `labels` [B], the record file's."""
        stored = self.labels.read(np.asarray(rows, np.int64))
        wrong = np.flatnonzero(stored != np.asarray(labels))
        if len(wrong):
            raise FeatureError(
                f"{self.path}: row {rows[wrong[0]]} is of class {stored[wrong[0]]}, but in {self.record} of class "
                f"{labels[wrong[0]]}: made from another record file; {rewrite(self.path)}"
            )

    def read(self, rows, out=None):
        """The rows int64 [B] as stored: float32 [B, D], in `out` if given.

        FeatureError for a row that is not finite, or too long to be normalised in float32.
        """
        out = self.features.read(rows, np.empty((len(rows), self.width), np.float32) if out is None else out)
        finite = np.isfinite(np.einsum("nd,nd->n", out, out))
        if not finite.all():
            raise FeatureError(
                f"{self.path}: NaN, infinity or a length beyond 1e19 in row {rows[~finite][0]}; {rewrite(self.path)}"
            )
        return out

    def read_credible(self, rows):
        """bool [B]: which of the rows int64 [B] have a credible old feature."""
        return self._credible.read(rows) if self._credible else np.ones(len(rows), bool)


class RowFile:
    """Reads rows of a .npy file (`ndim`, `kind`: see `open_array`) by system calls; `array` is its memory map.

    `file[rows]`, rows int64 [B] or a slice, is an array of them. Through the map, a truncated file or a failing disk
    would kill the process with SIGBUS, and each uncached row would cost 128 KB of readahead. Unpickled (in a spawned
    worker) it reopens the file.
    Raises FeatureError with `remedy`, the next step; default: the command that writes the file.
    """

    def __init__(self, path, ndim, kind, remedy=None):
        self.path, self.expected, self.array = path, (ndim, kind, remedy), open_array(path, ndim, kind)
        self.dtype, self.shape, self.remedy = self.array.dtype, self.array.shape, remedy or rewrite(path)
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)

    def __reduce__(self):
        return RowFile, (self.path, *self.expected)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        return self.read(np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows)

    def read(self, rows, out=None):
        """The rows int64 [B], in the file's dtype, or in `out` [B, …] and its dtype."""
        outside = (rows < 0) | (rows >= len(self))
        if outside.any():
            raise IndexError(f"{self.path}: row {rows[outside][0]} is out of range, the file has {len(self)} rows")
        if not self.array.flags.c_contiguous:  # Fortran order, as np.save writes a transposed array
            stored = self.array[rows]
        else:
            direct = out is not None and out.dtype == self.dtype
            stored = self._read_stored(rows, out if direct else np.empty((len(rows), *self.shape[1:]), self.dtype))
        if out is None:
            return stored
        if stored is not out:
            out[...] = stored
        return out

    def _read_stored(self, rows, values):
        """Fill `values` [B, …], contiguous, of the file's dtype, and return it. Consecutive rows are read at once."""
        size = self.array[:1].nbytes
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1).tolist()
        runs = [(rows[start], start * size, stop * size) for start, stop in zip(starts, [*starts[1:], len(rows)])]
        if hasattr(os, "posix_fadvise"):
            for row, begin, end in runs:  # all requests reach the disk at once
                os.posix_fadvise(self.file, self.array.offset + row * size, end - begin, os.POSIX_FADV_WILLNEED)
        memory = memoryview(values.reshape(-1).view(np.uint8))
        for row, begin, end in runs:
            self._read_run(row, size, memory[begin:end])
        return values

    def _read_run(self, row, size, memory):
        """Fill `memory` with the rows from `row` on, of `size` bytes each."""
        begin, done = self.array.offset + row * size, 0
        while done < len(memory):  # network disks may return less than asked for
            try:
                read = os.preadv(self.file, [memory[done:]], begin + done)
            except OSError as error:
                raise FeatureError(
                    f"{self.path}: row {row + done // size} cannot be read ({error.strerror}); check the disk. "
                    f"If the file is lost, {self.remedy}"
                ) from error
            if not read:
                raise FeatureError(f"{self.path}: truncated before the end of row {row + done // size}; {self.remedy}")
            done += read
