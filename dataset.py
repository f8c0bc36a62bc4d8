"""The training set in a `.rec` file, and the loaders that bring its batches to the device.

Workers decode a whole batch into one uint8 tensor; mirroring and normalisation happen once a batch, on the device.
Order and mirroring follow from (seed, epoch) alone: one rank and many, or a run resumed in mid-epoch, see the same.
"""

import gc
import pathlib
import traceback

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from image_layout import image_layout
from recordio import RecordError, RecordReader, class_label

IMAGE_SHAPE = (112, 112, 3)


def decode_bgr(data):
    """Decode a JPEG or PNG, a uint8 array: [112, 112, 3], in OpenCV's order of channels.

    Raises `ValueError` for bytes that are not a whole image (OpenCV alone would fill the missing end of a JPEG with
    grey) and for images of another size.
    """
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) and not _is_cut_jpeg(data) else None
    if image is None:
        raise ValueError(f"its {len(data)} bytes do not decode as an image")
    if image.shape != IMAGE_SHAPE:
        raise ValueError(f"image is {image.shape[1]} x {image.shape[0]}, not 112 x 112: align the faces first")
    return image


def _is_cut_jpeg(data):
    """Whether the end marker lacks. Scan data cannot hold it: 0xff is always followed by a zero or a restart number."""
    end = b"\xff\xd9"
    return end not in data[-64:].tobytes() and data[:3].tobytes() == b"\xff\xd8\xff" and end not in data.tobytes()


def open_train_set(rec, num_classes=None, num_image=None):
    """`RecordDataset`, or `SyntheticDataset` where `rec` is "synthetic". Counts that are None or 0 are not stated."""
    return (SyntheticDataset if str(rec) == "synthetic" else RecordDataset)(rec, num_classes, num_image)


def _resolve(rec):
    """The `.rec` file that a path names: itself, without its suffix, or `train.rec` in a directory."""
    rec = pathlib.Path(rec)
    candidates = [rec / "train.rec", rec.with_name(rec.name + ".rec"), rec]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{rec}: no .rec file, with or without the suffix, nor a directory with train.rec")
    return found


class _ImageSet(Dataset):
    """Items of one image, by the subclass's `fill`, which decodes many."""

    def __len__(self):
        return self.num_image

    def __getitem__(self, row):
        image = np.empty((1, *IMAGE_SHAPE), np.uint8)
        label = self.fill([row], image)[0]
        return torch.from_numpy(image[0]), int(label), int(row)

    def _inside(self, row):
        if not 0 <= row < self.num_image:
            raise IndexError(f"{self.path}: row {row} is outside the set of {self.num_image} images")
        return int(row)


class RecordDataset(_ImageSet):
    """The images of a `.rec` training set in record order.

    An item is `(image, label, index)`: RGB uint8 [112, 112, 3], class in [0, num_classes), and its row in the set,
    which is also its row in the feature files.

    Args:
        rec: path of the `.rec`, with or without the suffix, or of a directory that holds `train.rec`.
        num_classes, num_image: None or 0 takes them from the header record (from all labels where there is none).

    Raises `RecordError` where a stated count is not the file's, and, naming file, key and offset, for a record that
    is broken, does not decode, is not 112 x 112 or has a label outside [0, num_classes).
    """

    def __init__(self, rec, num_classes=None, num_image=None):
        self.path = _resolve(rec)
        self.reader = RecordReader(self.path)
        self.reader.check()
        self.keys, stated_classes = image_layout(self.reader)
        self._labels = None
        self.num_image = len(self.keys)
        self.num_classes = stated_classes or num_classes or 0
        self._agree("num_image", num_image, self.num_image)
        self._agree("num_classes", num_classes, self.num_classes)
        if not self.num_classes:
            self.num_classes = int(self.labels().max(initial=-1)) + 1

    def __getstate__(self):
        return self.__dict__ | {"_labels": None}

    def fill(self, rows, images):
        """Decode the rows into `images`, a NumPy uint8 [B, 112, 112, 3] in RGB; returns their labels, int64 [B]."""
        labels = np.empty(len(rows), np.int64)
        for i, row in enumerate(rows):
            bgr, labels[i] = self._load(int(self.keys[self._inside(row)]))
            cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB, dst=images[i])
        return labels

    def label(self, row):
        """The class of a row; reads the record's header only."""
        key = int(self.keys[self._inside(row)])
        return self._checked(class_label(self.reader.read_header(key)), key)

    def labels(self):
        """The classes of all rows, int64 [N]. Scans all headers once, then remembers."""
        if self._labels is None:
            labels = np.empty(self.num_image, np.int64)
            step = 1 << 14
            with tqdm(total=len(labels), desc=f"labels of {self.path.name}", unit="rec", disable=None) as bar:
                for start in range(0, len(labels), step):
                    found = self.reader.read_labels(self.keys[start:start + step])
                    wrong = ~((found >= 0) & (found < (self.num_classes or np.inf)) & (np.mod(found, 1) == 0))
                    for i in np.flatnonzero(wrong)[:1]:
                        self._checked(float(found[i]), self.keys[start + i])
                    labels[start:start + step] = found
                    self.reader.release()
                    bar.update(len(found))
            self._labels = labels
        return self._labels

    def _load(self, key):
        label, data = self.reader.read_image(key)
        try:
            bgr = decode_bgr(data)
        except (ValueError, cv2.error) as error:
            raise RecordError(f"{self.path}: key {key} at offset {self.reader.offset(key)}: {error}") from None
        return bgr, self._checked(label, key)

    def _checked(self, label, key):
        if label >= 0 and label % 1 == 0 and (label < self.num_classes or not self.num_classes):
            return int(label)
        raise RecordError(
            f"{self.path}: key {key} at offset {self.reader.offset(key)}: label {label:.10g} is not a class"
            + (f"; there are {self.num_classes}, 0 to {self.num_classes - 1}" if self.num_classes else "")
        )

    def _agree(self, name, stated, found):
        if stated and stated != found:
            raise RecordError(
                f"{self.path}: {name} is {found} by its header record and index, the config says {stated}; "
                f"set {name} = {found}, or 0 to take it from the file"
            )


class SyntheticDataset(_ImageSet):
    """Random images with the surface of `RecordDataset`, for measuring speed without data (rec = "synthetic")."""

    def __init__(self, rec="synthetic", num_classes=None, num_image=None):
        if not num_classes or not num_image:
            raise ValueError(f"rec = \"synthetic\" needs num_classes and num_image, got {num_classes} and {num_image}")
        self.path = pathlib.Path(rec)
        self.num_classes, self.num_image = int(num_classes), int(num_image)
        self._noise = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)

    def fill(self, rows, images):
        """As `RecordDataset.fill`; an image is a stretch of noise whose place follows from its row."""
        for row, image in zip(rows, images):
            start = self._inside(row) * 7919 % (len(self._noise) - image.size)
            image.reshape(-1)[:] = self._noise[start:start + image.size]
        return np.asarray(rows, np.int64) % self.num_classes

    def label(self, row):
        return self._inside(row) % self.num_classes

    def labels(self):
        return np.arange(self.num_image, dtype=np.int64) % self.num_classes


class _Batches(Dataset):
    """What the workers run: decode a batch into its place in memory that they share with the main process.

    The places are used again and again. A fresh one for each batch would cost a worker a fifth of its time, in page
    faults, and file descriptors.
    """

    def __init__(self, dataset, places, batch_size):
        self.dataset = dataset
        self.places = torch.empty((places, batch_size, *IMAGE_SHAPE), dtype=torch.uint8).share_memory_()

    def __getitem__(self, item):
        place, rows, mirrored = item
        try:
            return place, self.dataset.fill(rows, self.places[place].numpy()), rows, mirrored
        except RecordError as error:
            return error  # raised in a worker, its message would be lost in that process's traceback


class _Places:
    """The steps of a plan, each with the place that its batch goes to: yields `(place, rows, mirrored)`."""

    def __init__(self, plan, places):
        self.plan, self.places = plan, places

    def __iter__(self):
        return ((i % self.places, *step) for i, step in enumerate(self.plan))


def _unchanged(batch):
    return batch


def _start_worker(_):
    cv2.setNumThreads(0)  # the workers are the parallelism
    gc.freeze()  # the parent's objects are not for this process to walk through again and again


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

    def __init__(self, dataset, plan, device, num_workers, prefetch=2):
        if plan.batch_size < 1:
            raise ValueError(f"batch_size is {plan.batch_size}, it must be at least 1")
        self.dataset, self.device = dataset, torch.device(device)
        self._plan = plan
        # A DataLoader keeps `prefetch` batches a worker in the making; one more is in our hands.
        places = num_workers * prefetch + 1
        self._shared = _Batches(dataset, places, plan.batch_size)
        self._batches = DataLoader(
            self._shared,
            batch_size=None,
            sampler=_Places(plan, places),
            num_workers=num_workers,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            prefetch_factor=prefetch if num_workers else None,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # else every epoch would draw from the generator that the training uses
        )

    def __len__(self):
        """Steps of a whole epoch, the same on every rank."""
        return len(self._plan)

    def __iter__(self):
        return self._one_ahead() if self.device.type == "cuda" else map(self._on_device, self._decoded())

    def _decoded(self):
        try:
            for batch in self._batches:
                if isinstance(batch, RecordError):
                    raise batch
                yield batch
        except Exception as error:
            # Its frames and the DataLoader's iterator hold each other. Workers forked later would inherit that garbage
            # and, collecting it, wait five seconds for each of its processes, which are not their children.
            batch = None
            traceback.clear_frames(error.__traceback__)
            raise

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
        stream, waiting = torch.cuda.Stream(self.device), None
        for batch in self._decoded():
            with torch.cuda.stream(stream):
                ready = self._on_device(batch), stream.record_event()
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


class ExtractLoader(_Loader):
    """The rows `start` ... `stop` in record order, never mirrored; the last batch may be short.

    Yields what `TrainLoader` does.
    """

    def __init__(self, dataset, batch_size, device, num_workers=2, start=0, stop=None):
        stop = len(dataset) if stop is None else stop
        if not 0 <= start <= stop <= len(dataset):
            raise ValueError(f"rows {start} to {stop} are not within the {len(dataset)} rows of {dataset.path}")
        super().__init__(dataset, RowsInOrder(batch_size, start, stop), device, num_workers)
