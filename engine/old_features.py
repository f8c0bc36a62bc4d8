"""What the old model left for a training set, read by row number: its features, and which of them are credible.

engine/feature_files.py says which files there are and what they are called; engine/features.py writes them.
"""

import collections
import concurrent.futures
import os
import pathlib
import re
import weakref

import numpy as np
import torch

from engine.feature_files import FeatureError, again, again_from_images, check_not_older, command_for
from engine.features import open_array, to_device

LABELS_SAMPLED = 1024   # rows whose labels are held against the record file when features are opened


class OldFeatures:
    """The old model's features of the training set; `features` is memory-mapped: a machine's ranks share one copy.

    feature_path: …_feature.npy, float [N, D]. label_path: by default the …_label.npy beside it.
    train_set: the training set, of which length and a spread sample of labels are compared here.
    embedding_size: the width that the new model needs; None = any.
    old_model_path: the model that the features must not be older than; "" or None = any age will do.
    Raises FeatureError, with the command to run, for files that are missing, stale or not of this training set.

    A loader that gets this as its `read_ahead` has the rows of the coming batches read in a thread; `old[index]` and
    `fetch` then find them ready. Other rows, and those of the first batches, they read themselves.
    """

    def __init__(self, feature_path, train_set, label_path=None, embedding_size=None, old_model_path=None):
        if not feature_path:
            raise FeatureError("old_embedding is empty; set it in the config to a …_feature.npy of get_feature.py")
        self.path, self.record = pathlib.Path(feature_path), train_set.path
        label_path = pathlib.Path(label_path or re.sub(r"_feature\.npy$", "_label.npy", str(feature_path)))
        self.features = open_array(self.path, 2, np.floating)
        self.labels = np.array(open_array(label_path, 1, np.integer))   # in memory: every step asks for some
        self.pending = None
        for path, array in ((self.path, self.features), (label_path, self.labels)):
            if len(array) != len(train_set):
                self._wrong(f"{path}: {len(array)} rows, but {self.record} has {len(train_set)} images")
        if embedding_size is not None and self.features.shape[1] != embedding_size:
            raise FeatureError(
                f"{self.path}: features of width {self.features.shape[1]}, but embedding_size is {embedding_size}; "
                "set embedding_size to the old model's, or take the features of an old model of that width; "
                f"if that model has changed since, {again(self.path)}"
            )
        check_not_older(self.path, old_model_path)
        rows = np.unique(np.linspace(0, len(train_set) - 1, LABELS_SAMPLED).astype(np.int64)) if len(train_set) else []
        for row in rows:
            self._compare(row, self.labels[row], train_set.label(int(row)))
        self._file = _RowFile(self.path, self.features)
        self._ahead = _ReadAhead(self._file)
        self._wanted = self._to_cuda = False

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        """Rows as they are stored: index int64 [B], on the CPU -> float32 [B, D] on the CPU, a copy.

        Raises FeatureError for a row that is not finite or no longer in the file, IndexError for one outside the set.
        """
        self._wanted = True
        rows = np.asarray(index, dtype=np.int64)
        ready = self._ahead.take(rows)
        return self._file.read(rows, torch.empty(len(rows), self._file.width)) if ready is None else ready

    def fetch(self, index, device):
        """Rows of index int64 [B] (CPU) as float32 [B, D] on the device, without waiting for it: see `to_device`.

        Called before the backbone, the rows are on their way while the device is still at work.
        """
        self._to_cuda = torch.device(device).type == "cuda"
        return to_device(self[index], device)

    def prefetch(self, rows, batches):
        """A loader's announcement: the rows int64 [B] of a coming batch, one of the next `batches`.

        Nothing is read ahead until rows have been asked for once: a method that only compares labels pays nothing.
        """
        if self._wanted:
            self._ahead.begin(rows, batches, torch.empty(len(rows), self._file.width, pin_memory=self._to_cuda))

    def check_labels(self, index, labels):
        """Hold a batch's labels [B] (any device) against the stored ones of its rows `index` [B] (CPU).

        Raises FeatureError. On CUDA the labels come over while the step runs and are compared when the next batch
        comes, so that the host never waits for the device.
        """
        stored = torch.from_numpy(self.labels[np.asarray(index)].astype(np.int64))
        if not labels.is_cuda:
            return self._check(index, stored, labels)
        if self.pending is not None:
            event, *batch = self.pending
            event.synchronize()
            self._check(*batch)
        event, on_host = torch.cuda.Event(), labels.detach().to("cpu", non_blocking=True)
        event.record()
        self.pending = (event, index, stored, on_host)

    def _check(self, index, stored, labels):
        wrong = (stored != labels.view(-1)).nonzero().flatten()
        if len(wrong):
            self._compare(index[wrong[0]], stored[wrong[0]], labels.view(-1)[wrong[0]])

    def _compare(self, row, stored, label):
        if int(stored) != int(label):
            self._wrong(
                f"{self.path}: row {int(row)} is of class {int(stored)}, but in {self.record} of class {int(label)}"
            )

    def _wrong(self, what):
        raise FeatureError(
            f"{what}: the features were made from another record file. Run get_feature again: {command_for(self.path)}"
        )


class _RowFile:
    """Rows of a memory-mapped .npy file, read from the file itself.

    By the mapping, a file cut short or a disk that fails would end the process by SIGBUS, and each row that is not in
    memory would take 128 KB from the disk. The system calls let other threads run.
    """

    def __init__(self, path, array):
        self.path, self.array = path, array
        self.width = array.shape[1]
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)

    def read(self, rows, out):
        """Fill `out`, float32 [B, D], with the rows int64 [B], and return it."""
        outside = (rows < 0) | (rows >= len(self.array))
        if outside.any():
            raise IndexError(f"{self.path}: row {rows[outside][0]} is outside its {len(self.array)} rows")
        values = out.numpy()
        if not self.array.flags.c_contiguous:   # column by column, as np.save writes a transposed array
            values[...] = self.array[rows]
        elif self.array.dtype == values.dtype:
            self._read_stored(rows, values)
        else:
            values[...] = self._read_stored(rows, np.empty(values.shape, self.array.dtype))
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            raise FeatureError(f"{self.path}: NaN or infinity in row {rows[~finite][0]}; {again(self.path)}")
        return out

    def _read_stored(self, rows, values):
        """Fill `values` [B, D], of the file's own type, and return it."""
        size = self.array.dtype.itemsize * self.width
        offsets = (self.array.offset + rows * size).tolist()
        if hasattr(os, "posix_fadvise"):
            for offset in offsets:  # the disk gets all of them at once
                os.posix_fadvise(self.file, offset, size, os.POSIX_FADV_WILLNEED)
        memory = memoryview(values.view(np.uint8).reshape(-1))
        for place, (row, offset) in enumerate(zip(rows, offsets)):
            self._read_row(row, offset, memory[place * size:(place + 1) * size])
        return values

    def _read_row(self, row, offset, memory):
        try:
            read = os.preadv(self.file, [memory], offset)
            while 0 < read < len(memory):   # network disks may give less than is there
                more = os.preadv(self.file, [memory[read:]], offset + read)
                read = read + more if more else 0
        except OSError as error:
            raise FeatureError(
                f"{self.path}: row {row} cannot be read ({error.strerror}); is its disk still there? "
                f"If the file is lost, {again(self.path)}"
            ) from error
        if not read and len(memory):
            raise FeatureError(f"{self.path}: ends before row {row} is whole, so it was cut; {again(self.path)}")


class _ReadAhead:
    """Batches of rows that a thread reads while the steps before them are computed."""

    def __init__(self, file):
        self.file, self.thread = file, None
        self.waiting = collections.deque()  # (rows, their future) in the order in which they will be asked for

    def begin(self, rows, batches, out):
        """Read `rows` into `out`, both as in `_RowFile.read`; at most `batches` wait, older ones are given up."""
        if self.thread is None:     # not before: processes forked until now have no part in it
            self.thread = concurrent.futures.ThreadPoolExecutor(1, "old features")
        while len(self.waiting) >= batches:
            self._give_up()
        self.waiting.append((rows, self.thread.submit(self.file.read, rows, out)))

    def take(self, rows):
        """What was read for exactly these rows, or its error; None if they are not among those that wait."""
        for place, (its, _) in enumerate(self.waiting):
            if np.array_equal(its, rows):
                for _ in range(place):  # batches of an epoch that was left early
                    self._give_up()
                return self.waiting.popleft()[1].result()
        return None

    def _give_up(self):
        self.waiting.popleft()[1].cancel()


def load_credible(path, train_set, old_model_path=None):
    """bool [N] on the CPU: which rows of the training set have a credible old feature (see denoise_credible.py).

    path: …_credible_ratio_90_feature.npy; "" = all rows are credible. old_model_path: as for OldFeatures.
    Raises FeatureError, with the command to run, for a missing file, one that is stale or of another length, or one
    without a credible row.
    """
    if not path:
        return torch.ones(len(train_set), dtype=torch.bool)
    credible = torch.from_numpy(np.array(open_array(path, 1, np.bool_)))
    if len(credible) != len(train_set):
        raise FeatureError(
            f"{path}: {len(credible)} rows, but {train_set.path} has {len(train_set)} images: "
            f"it was made from another record file; {again_from_images(path)}"
        )
    if not credible.any():
        raise FeatureError(f"{path}: no row is credible; {again(path)}")
    check_not_older(path, old_model_path)
    return credible
