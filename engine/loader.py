"""Batches of a training set on the device: decoded by worker processes, with the old model's rows of the same images.

Workers decode a whole batch into one uint8 tensor; mirroring and normalisation happen once a batch, on the device.
Order and mirroring follow from (seed, epoch) alone: one rank and many, or a run resumed in mid-epoch, see the same.
"""

import sys
import traceback
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from core.distributed import to_device
from core.errors import UserError
from dataset import IMAGE_SHAPE, to_input
from engine.workers import FileSize, WorkerError, Workers, start_worker
from recordio import RecordError


class Batch(NamedTuple):
    """One rank's images of a step, and what belongs to them. B = batch_size; row i of every field is one image's."""

    images: torch.Tensor  # float32 [B, 3, 112, 112] in [-1, 1], on the device
    labels: torch.Tensor  # int64 [B], on the device
    index: torch.Tensor  # int64 [B], on the CPU: rows of the training set and of every feature file
    old: torch.Tensor | None = None  # float32 [B, D], on the device: old features as stored, not normalised
    credible: torch.Tensor | None = None  # bool [B], on the CPU: which of `old` may be used


class OldRows:
    """What the workers do beside decoding: compare labels with the old model's files, and read the batch's rows.

    old: an old_model.OldFeatures. rows: False = compare labels alone (a method that uses no rows).
    """

    def __init__(self, old, rows=True):
        self.old, self.width = old, old.width if rows else 0

    def read(self, rows, labels, out):
        """Fill `out`, float32 [B, D], and return the credible flags, bool [B]; None without rows."""
        self.old.compare_labels(rows, labels)
        if not self.width:
            return None
        self.old.read(rows, out)
        return self.old.read_credible(rows)


class _Batches(Dataset):
    """What the workers run: fill a place in memory that they share with the main process with a batch.

    The places are used again and again. A fresh one for each batch would cost a worker a fifth of its time, in page
    faults, and file descriptors. Raises WorkerError where there is no room for them.

    A file that has been cut is noticed before each batch. Cut just while one is read, it ends the process by SIGBUS: a
    worker, which the main process explains, or with num_workers = 0 the training.
    """

    def __init__(self, dataset, file, places, batch_size, num_workers, old):
        self.dataset, self.file, self.old = dataset, file, old
        self.images = torch.empty((places, batch_size, *IMAGE_SHAPE), dtype=torch.uint8)
        self.old_rows = torch.empty((places, batch_size, old.width if old else 0))
        size = self.images.nbytes + self.old_rows.nbytes
        try:
            for places in (self.images, self.old_rows):
                if num_workers and places.numel():
                    places.share_memory_()
        except RuntimeError as error:
            raise WorkerError(
                f"num_workers = {num_workers} need {size >> 20} MB of shared memory on each rank "
                f"({str(error).splitlines()[0]}): enlarge /dev/shm (docker: --shm-size=8g) or lower num_workers"
            ) from error

    def __getitem__(self, item):
        place, rows, mirrored = item
        try:
            labels = self._decode(rows, self.images[place].numpy())
            old_rows = self.old_rows[place, : len(rows)].numpy()
            credible = self.old.read(rows, labels, old_rows) if self.old else None
            return place, labels, rows, mirrored, credible
        except UserError as error:
            return error  # raised in a worker, its message would be lost in that process's traceback

    def _decode(self, rows, images):
        self.file.check()
        try:
            return self.dataset.fill(rows, images)
        except RecordError:
            self.file.check()  # a record is broken, too, where a file was cut meanwhile
            raise


class _Places:
    """The steps of a plan, each with the place that its batch goes to: yields `(place, rows, mirrored)`."""

    def __init__(self, plan, places):
        self.plan, self.places = plan, places

    def __iter__(self):
        return ((i % self.places, *step) for i, step in enumerate(self.plan))


def _unchanged(batch):
    return batch


class ShuffledRows:
    """Which rows a rank takes in each step of an epoch, and which of them are mirrored: yields `(rows, mirrored)`."""

    def __init__(self, num_image, batch_size, seed, rank, world_size):
        self.num_image, self.batch_size, self.seed = num_image, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start_step = 0

    def __len__(self):
        return self.num_image // (self.batch_size * self.world_size)

    def __iter__(self):
        draw = np.random.default_rng([self.seed, self.epoch])
        order = draw.permutation(self.num_image)
        # Drawn by place in the epoch: what is mirrored depends neither on the number of ranks nor on the batch size.
        mirrored = draw.integers(0, 2, self.num_image, np.uint8).astype(bool)
        whole, mine = self.batch_size * self.world_size, self.batch_size * self.rank
        for step in range(self.start_step, len(self)):
            place = slice(step * whole + mine, step * whole + mine + self.batch_size)
            yield order[place], mirrored[place]


class RowsInOrder:
    """The rows `start` ... `stop`, none mirrored."""

    def __init__(self, batch_size, start, stop):
        self.batch_size, self.start, self.stop = batch_size, start, stop

    def __len__(self):
        return -(-(self.stop - self.start) // self.batch_size)

    def __iter__(self):
        for first in range(self.start, self.stop, self.batch_size):
            yield np.arange(first, min(first + self.batch_size, self.stop)), np.zeros(0, bool)


class _Loader:
    """Batches of the rows that `plan` names, through worker processes, to the device."""

    def __init__(self, dataset, plan, device, num_workers, old=None, prefetch=2):
        if plan.batch_size < 1:
            raise ValueError(f"batch_size is {plan.batch_size}, it must be at least 1")
        self.dataset, self.device = dataset, torch.device(device)
        self._plan, self._stream = plan, None
        # A DataLoader keeps `prefetch` batches a worker in the making; one more is in our hands.
        places = num_workers * prefetch + 1
        file = FileSize(dataset.path)
        self._shared = _Batches(dataset, file, places, plan.batch_size, num_workers, old)
        self._workers = Workers(file, num_workers)
        self._batches = DataLoader(
            self._shared,
            batch_size=None,
            sampler=_Places(plan, places),
            num_workers=num_workers,
            collate_fn=_unchanged,
            worker_init_fn=start_worker,
            prefetch_factor=prefetch if num_workers else None,
            persistent_workers=num_workers > 0,
            # Forked they share the index in memory and begin at once, with one thread: see workers.start_worker.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
            generator=torch.Generator(),  # else every epoch would draw from the generator that the training uses
        )

    def __len__(self):
        """Steps of a whole epoch, the same on every rank."""
        return len(self._plan)

    def __iter__(self):
        return self._one_ahead() if self.device.type == "cuda" else map(self._on_device, self._filled())

    def _filled(self):
        try:
            for batch in self._received():
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except Exception as error:
            # Its frames and the DataLoader's iterator hold each other. Workers forked later would inherit that garbage
            # and, collecting it, wait five seconds for each of its processes, which are not their children.
            batch = None
            traceback.clear_frames(error.__traceback__)
            raise

    def _received(self):
        """What the workers give. A worker that died is an error here, between two batches, and nowhere else."""
        self._workers.check()
        try:
            with self._workers.starting():
                batches = iter(self._batches)
            for batch in batches:
                yield batch
                self._workers.check()
        except RuntimeError:
            if not self._workers.dead():
                raise
        self._workers.check()

    def _on_device(self, filled):
        """The Batch; nothing of it lies in the place any more, which the workers fill again."""
        place, labels, rows, mirrored, credible = filled
        images = to_device(self._shared.images[place, : len(rows)], self.device)
        mirrored = to_device(torch.from_numpy(mirrored), self.device) if len(mirrored) else None
        index, old = torch.from_numpy(rows), None
        if credible is not None:
            old = self._shared.old_rows[place, : len(rows)]
            old = to_device(old, self.device) if self.device.type == "cuda" else old.clone()
            credible = torch.from_numpy(credible)
        return Batch(to_input(images, mirrored), to_device(torch.from_numpy(labels), self.device), index, old, credible)

    def _one_ahead(self):
        """Copy and prepare each batch on a stream of its own while the one before it is computed with."""
        if self._stream is None:  # one for good: memory that was allocated on a stream is reused by that one alone
            self._stream = torch.cuda.Stream(self.device)
        waiting = None
        for filled in self._filled():
            with torch.cuda.stream(self._stream):
                ready = self._on_device(filled), self._stream.record_event()
            if waiting is not None:
                yield self._hand_over(*waiting)
            waiting = ready
        if waiting is not None:
            yield self._hand_over(*waiting)

    def _hand_over(self, batch, copied):
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for tensor in batch:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(current)  # allocated on the other stream: not to be reused while this one needs it
        return batch


class TrainLoader(_Loader):
    """A rank's share of every global batch of an epoch, shuffled and randomly mirrored, as `Batch`.

    The global batch of step s is perm[s*G : (s+1)*G] with G = batch_size * world_size and perm drawn from
    (seed, epoch); a rank takes its contiguous slice. The rest that fills no global batch is dropped.

    Args:
        batch_size: images a rank and step.
        num_workers: processes that decode; 0 decodes in this one.
        seed: >= 0 and the same on every rank.
        old: `OldRows` of the training set, or None for batches without them.

    Raises `WorkerError` where shared memory is too small. Iterating raises `RecordError` for a broken record or a file
    that was cut, `FeatureError` for old features that cannot be read or are another record file's, and `WorkerError`
    for a worker that was killed.
    """

    def __init__(self, dataset, batch_size, device, num_workers=2, seed=0, rank=0, world_size=1, old=None):
        plan = ShuffledRows(len(dataset), batch_size, seed, rank, world_size)
        super().__init__(dataset, plan, device, num_workers, old)
        if len(self) == 0:
            raise ValueError(
                f"{dataset.path} has {len(dataset)} images, fewer than one global batch of {batch_size} x {world_size} "
                f"ranks: set a smaller batch_size"
            )

    def set_epoch(self, epoch, start_step=0):
        """Choose the epoch, counted from 0, that the next iteration draws; `start_step` leaves out its first steps."""
        if not 0 <= start_step <= len(self):
            raise ValueError(f"start_step {start_step} is outside the epoch of {len(self)} steps")
        self._plan.epoch, self._plan.start_step = epoch, start_step


class ExtractLoader(_Loader):
    """The rows `start` ... `stop` in record order, never mirrored, as `Batch`; the last one may be short."""

    def __init__(self, dataset, batch_size, device, num_workers=2, start=0, stop=None):
        stop = len(dataset) if stop is None else stop
        if not 0 <= start <= stop <= len(dataset):
            raise ValueError(f"rows {start} to {stop} are not within the {len(dataset)} rows of {dataset.path}")
        super().__init__(dataset, RowsInOrder(batch_size, start, stop), device, num_workers)
