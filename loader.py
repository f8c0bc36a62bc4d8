"""The loaders that bring a training set's batches to the device.

Workers decode a whole batch into one uint8 tensor; mirroring and normalisation happen once a batch, on the device.
Order and mirroring follow from (seed, epoch) alone: one rank and many, or a run resumed in mid-epoch, see the same.
"""

import sys
import traceback

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_workers import FileSize, WorkerError, Workers, start_worker
from dataset import IMAGE_SHAPE
from recordio import RecordError


class _Batches(Dataset):
    """What the workers run: decode a batch into its place in memory that they share with the main process.

    The places are used again and again. A fresh one for each batch would cost a worker a fifth of its time, in page
    faults, and file descriptors. Raises WorkerError where there is no room for them.

    A file that has been cut is noticed before each batch. Cut just while one is read, it ends the process by SIGBUS: a
    worker, which the main process explains, or with num_workers = 0 the training.
    """

    def __init__(self, dataset, file, places, batch_size, num_workers):
        self.dataset, self.file = dataset, file
        self.places = torch.empty((places, batch_size, *IMAGE_SHAPE), dtype=torch.uint8)
        try:
            if num_workers:
                self.places.share_memory_()
        except RuntimeError as error:
            raise WorkerError(
                f"num_workers = {num_workers} need {self.places.nbytes >> 20} MB of shared memory on each rank "
                f"({str(error).splitlines()[0]}): enlarge /dev/shm (docker: --shm-size=8g) or lower num_workers"
            ) from error

    def __getitem__(self, item):
        place, rows, mirrored = item
        try:
            return place, self._fill(rows, self.places[place].numpy()), rows, mirrored
        except RecordError as error:
            return error  # raised in a worker, its message would be lost in that process's traceback

    def _fill(self, rows, images):
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


def to_input(images, mirrored=None):
    """uint8 [B, 112, 112, 3] -> float32 [B, 3, 112, 112] in [-1, 1]: (x/255 - 0.5)/0.5.

    Images whose entry in `mirrored`, bool [B], is True are flipped left to right.
    """
    if images.device.type == "cpu":
        return _to_input_by_image(images, [False] * len(images) if mirrored is None else mirrored.tolist())
    return _to_input_by_batch(images, mirrored)


def _to_input_by_batch(images, mirrored):
    if mirrored is not None:
        # Choosing among both versions by row number, unlike by mask, copies whole images and waits for nothing.
        row = torch.arange(len(images), device=images.device)
        images = torch.cat([images, images.flip(2)]).index_select(0, row + len(images) * mirrored)
    images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return images.mul_(1 / 127.5).sub_(1)


def _to_input_by_image(images, mirrored):
    """On the CPU a fraction of the work, for an image stays in the cache, and no threads that wait for each other."""
    count, height, width, channels = images.shape
    result = torch.empty((count, channels, height, width), dtype=torch.float32)
    planes = np.empty((channels * height, width), np.uint8)
    for image, mirror, out in zip(images.numpy(), mirrored, result.view(count, *planes.shape).numpy()):
        cv2.split(image, list(planes.reshape(channels, height, width)))  # writes into `planes`
        np.copyto(out, cv2.flip(planes, 1) if mirror else planes)
        out *= np.float32(1 / 127.5)
        out -= 1
    return result


class ShuffledRows:
    """Which rows a rank takes in each step of an epoch, and which of them are mirrored: yields `(rows, mirrored)`."""

    def __init__(self, num_image, batch_size, seed, rank, world_size):
        self.num_image, self.batch_size, self.seed = num_image, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start_step = 0
        self._readers = []

    def read_ahead(self, reader, batches):
        """Let `reader.prefetch(rows, batches)` know the rows of every step, at most so many batches before its turn."""
        self._readers.append((reader, batches))

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
            for reader, batches in self._readers:
                reader.prefetch(order[place], batches)
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

    def __init__(self, dataset, plan, device, num_workers, prefetch=2):
        if plan.batch_size < 1:
            raise ValueError(f"batch_size is {plan.batch_size}, it must be at least 1")
        self.dataset, self.device = dataset, torch.device(device)
        self._plan, self._stream = plan, None
        # A DataLoader keeps `prefetch` batches a worker in the making; one more is in our hands.
        places = num_workers * prefetch + 1
        file = FileSize(dataset.path)
        self._shared = _Batches(dataset, file, places, plan.batch_size, num_workers)
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
            # Forked they share the index in memory and begin at once, with one thread: see data_workers.start_worker.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
            generator=torch.Generator(),  # else every epoch would draw from the generator that the training uses
        )

    def __len__(self):
        """Steps of a whole epoch, the same on every rank."""
        return len(self._plan)

    def __iter__(self):
        return self._one_ahead() if self.device.type == "cuda" else map(self._on_device, self._decoded())

    def _decoded(self):
        try:
            for batch in self._received():
                if isinstance(batch, RecordError):
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

    def _on_device(self, batch):
        place, labels, rows, mirrored = batch
        images = self._to_device(self._shared.places[place, :len(rows)])
        mirrored = self._to_device(torch.from_numpy(mirrored)) if len(mirrored) else None
        return to_input(images, mirrored), self._to_device(torch.from_numpy(labels)), torch.from_numpy(rows)

    def _to_device(self, tensor):
        """On CUDA by way of pinned memory, so that the copy waits for nothing and the place is free at once."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _one_ahead(self):
        """Copy and prepare each batch on a stream of its own while the one before it is computed with."""
        if self._stream is None:    # one for good: memory that was allocated on a stream is reused by that one alone
            self._stream = torch.cuda.Stream(self.device)
        waiting = None
        for batch in self._decoded():
            with torch.cuda.stream(self._stream):
                ready = self._on_device(batch), self._stream.record_event()
            if waiting is not None:
                yield self._hand_over(*waiting)
            waiting = ready
        if waiting is not None:
            yield self._hand_over(*waiting)

    def _hand_over(self, batch, copied):
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for tensor in batch[:2]:
            tensor.record_stream(current)  # allocated on the other stream: not to be reused while this one needs it
        return batch


class TrainLoader(_Loader):
    """A rank's share of every global batch of an epoch, shuffled and randomly mirrored.

    Yields images float32 [B, 3, 112, 112] in [-1, 1] and labels int64 [B] on `device`, index int64 [B] on the CPU.
    The global batch of step s is perm[s*G : (s+1)*G] with G = batch_size * world_size and perm drawn from
    (seed, epoch); a rank takes its contiguous slice. The rest that fills no global batch is dropped.

    Args:
        batch_size: images a rank and step.
        num_workers: processes that decode; 0 decodes in this one.
        seed: >= 0 and the same on every rank.

    Raises `WorkerError` where shared memory is too small. Iterating raises `RecordError` for a broken record or a file
    that was cut, and `WorkerError` for a worker that was killed.
    """

    def __init__(self, dataset, batch_size, device, num_workers=2, seed=0, rank=0, world_size=1):
        super().__init__(dataset, ShuffledRows(len(dataset), batch_size, seed, rank, world_size), device, num_workers)
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

    def read_ahead(self, reader):
        """Announce the rows of every coming batch to a reader such as OldFeatures: see `ShuffledRows.read_ahead`."""
        self._plan.read_ahead(reader, len(self._shared.places) + 1)  # one more than places is on its way to the GPU


class ExtractLoader(_Loader):
    """The rows `start` ... `stop` in record order, never mirrored; the last batch may be short.

    Yields what `TrainLoader` does.
    """

    def __init__(self, dataset, batch_size, device, num_workers=2, start=0, stop=None):
        stop = len(dataset) if stop is None else stop
        if not 0 <= start <= stop <= len(dataset):
            raise ValueError(f"rows {start} to {stop} are not within the {len(dataset)} rows of {dataset.path}")
        super().__init__(dataset, RowsInOrder(batch_size, start, stop), device, num_workers)
