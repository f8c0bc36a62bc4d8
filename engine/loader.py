"""Batches of a training set on the device: decoded by worker processes, with the old model's rows of the same images.

Workers decode a whole batch into one uint8 tensor; mirroring and normalisation run once per batch, on the device.
Order and mirroring depend only on (seed, epoch): they are the same for any number of ranks and for a resumed run.
"""

from typing import NamedTuple

import numpy as np
import torch

from core.distributed import is_main, to_device
from core.errors import UserError
from dataset import IMAGE_SHAPE, to_input
from engine.monitor import log
from engine.order import RowsInOrder, ShuffledRows
from engine.workers import FileSize, Workers, shared_slots
from recordio import RecordError


class Batch(NamedTuple):
    """One rank's images of a step and their data. B = batch_size; row i of every field belongs to the same image."""

    images: torch.Tensor  # float32 [B, 3, 112, 112] in [-1, 1], on the device
    labels: torch.Tensor  # int64 [B], on the device
    index: torch.Tensor  # int64 [B], on the CPU: rows in the training set and in every feature file
    old: torch.Tensor | None = None  # float32 [B, D], on the device: old features as stored, not normalised; 0 = none
    credible: torch.Tensor | None = None  # bool [B], on the CPU: which of `old` may be used, none of zeros among them


class OldRows:
    """The workers' job beside decoding: check labels against the old model's files, and read the batch's rows.

    old: an OldFeatures. rows: False = only check labels (a method that uses no rows).
    """

    def __init__(self, old, rows=True):
        self.old, self.width = old, old.width if rows else 0

    def read(self, rows, labels, out):
        """Fill `out`, float32 [B, D], and return the credible flags, bool [B], or None without rows."""
        self.old.compare_labels(rows, labels)
        if not self.width:
            return None
        self.old.read(rows, out)
        return self.old.read_credible(rows) & out.any(axis=1)


class _Batches:
    """Runs in the workers: fills a slot of memory, shared with the main process, with a batch.

    A record file that was truncated or overwritten is detected before each batch, and named where a read fails.
    """

    def __init__(self, dataset, file, batch_size, num_workers, old):
        self.dataset, self.file, self.old = dataset, file, old
        self.images = shared_slots(num_workers, (batch_size, *IMAGE_SHAPE), np.uint8)
        width = max(old.width if old else 0, 1)  # an empty one cannot be shared
        self.old_rows = shared_slots(num_workers, (batch_size, width), np.float32)

    def __getitem__(self, item):
        slot, rows, mirrored = item
        try:
            labels = self._decode(rows, self.images[slot].numpy())
            old_rows = self.old_rows[slot, : len(rows)].numpy()
            credible = self.old.read(rows, labels, old_rows) if self.old else None
            return slot, labels, rows, mirrored, credible
        except UserError as error:
            return error  # raised in a worker, its message would be lost in that process's traceback

    def _decode(self, rows, images):
        self.file.check()
        try:
            return self.dataset.fill(rows, images)
        except RecordError:
            self.file.check()  # a truncated file also looks like a damaged record
            raise


class _Slots:
    """The steps of a plan, each with the slot for its batch: yields `(slot, rows, mirrored)`."""

    def __init__(self, plan, slots):
        self.plan, self.slots = plan, slots

    def __iter__(self):
        return ((i % self.slots, *step) for i, step in enumerate(self.plan))


class _Loader:
    """Batches of the rows in `plan`, decoded by worker processes, on the device."""

    def __init__(self, dataset, plan, device, num_workers, old=None):
        if plan.batch_size < 1:
            raise ValueError(f"batch_size = {plan.batch_size} must be at least 1")
        self.dataset, self.device = dataset, torch.device(device)
        self._plan, self._stream, self._told = plan, None, False
        file = FileSize(dataset.path)
        self._shared = _Batches(dataset, file, plan.batch_size, num_workers, old)
        self._workers = Workers(self._shared, _Slots(plan, len(self._shared.images)), file, num_workers)

    def __len__(self):
        """Steps per full epoch, the same on every rank."""
        return len(self._plan)

    def __iter__(self):
        return self._one_ahead() if self.device.type == "cuda" else map(self._on_device, self._filled())

    def _filled(self):
        for batch in self._workers.received():
            if isinstance(batch, UserError):
                try:
                    raise batch
                finally:
                    del batch  # in a cycle with its traceback it would keep the workers until some later collection
            yield batch

    def _on_device(self, filled):
        """The Batch, copied out of its slot, which the workers will overwrite."""
        slot, labels, rows, mirrored, credible = filled
        images = to_device(self._shared.images[slot, : len(rows)], self.device)
        mirrored = to_device(torch.from_numpy(mirrored), self.device) if len(mirrored) else None
        index, old = torch.from_numpy(rows), None
        if credible is not None:
            old, credible = self._shared.old_rows[slot, : len(rows)], torch.from_numpy(credible)
            self._tell_of_zeros(old, rows)
            old = to_device(old, self.device) if self.device.type == "cuda" else old.clone()
        return Batch(to_input(images, mirrored), to_device(torch.from_numpy(labels), self.device), index, old, credible)

    def _tell_of_zeros(self, old, rows):
        """Log once, on rank 0, that images have no old feature."""
        if self._told or not is_main():
            return
        zero = ~old.any(dim=1)
        if zero.any():
            self._told = True
            log.warning(
                "%s: row %d is zero, as are %d of its batch of %d: images without an old feature, which have no "
                "old-side term",
                *(self._shared.old.old.path, rows[int(zero.int().argmax())], int(zero.sum()), len(rows)),
            )

    def _one_ahead(self):
        """Copy and prepare each batch on a separate stream while the previous one trains."""
        if self._stream is None:  # created once: memory allocated on a stream is reused only by that stream
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
                tensor.record_stream(current)  # allocated on the other stream, which must not reuse it yet
        return batch


class TrainLoader(_Loader):
    """A rank's share of every global batch of an epoch, shuffled and randomly mirrored, as `Batch`.

    The global batch of step s has the positions s*G ... (s+1)*G - 1 of the epoch's shuffle (engine/order.py), with G =
    batch_size * world_size; a rank takes its contiguous slice. The last, incomplete global batch is dropped.

    batch_size: images per rank and step.
    num_workers: decoding processes; 0 = decode in this process.
    seed: >= 0, the same on every rank.
    old: `OldRows` of the training set; None = batches without old features.

    Iterating raises `RecordError` for a damaged record or a truncated file, `FeatureError` for old features that cannot
    be read or belong to another record file, and `WorkerError` for a worker that cannot start or has died.
    """

    def __init__(self, dataset, batch_size, device, num_workers=2, seed=0, rank=0, world_size=1, old=None):
        plan = ShuffledRows(len(dataset), batch_size, seed, rank, world_size)
        super().__init__(dataset, plan, device, num_workers, old)
        if len(self) == 0:
            raise ValueError(
                f"{dataset.path} has {len(dataset)} images, fewer than one global batch of {batch_size} x {world_size} "
                f"ranks: lower batch_size"
            )

    def set_epoch(self, epoch, start_step=0):
        """Set the epoch, counted from 0, of the next iteration; it starts at step `start_step`."""
        if not 0 <= start_step <= len(self):
            raise ValueError(f"start_step {start_step} is out of range, the epoch has {len(self)} steps")
        self._plan.epoch, self._plan.start_step = epoch, start_step


class ExtractLoader(_Loader):
    """The rows `start` ... `stop` − 1 in record order, never mirrored, as `Batch`; the last may be short."""

    def __init__(self, dataset, batch_size, device, num_workers=2, start=0, stop=None):
        stop = len(dataset) if stop is None else stop
        if not 0 <= start <= stop <= len(dataset):
            raise ValueError(f"rows {start} to {stop} are not within the {len(dataset)} rows of {dataset.path}")
        super().__init__(dataset, RowsInOrder(batch_size, start, stop), device, num_workers)
