"""The training set in a `.rec` file, and the loaders that bring its batches to the device.

Workers decode a whole batch into one uint8 tensor; mirroring and normalisation happen once a batch, on the device.
Which images a step sees, and which of them are mirrored, depends on (seed, epoch, step) and the *global* batch size
alone: one rank and many see the same, and a run that resumes inside an epoch sees what it would have seen.
"""

import pathlib
from collections import namedtuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from recordio import IRHeader, RecordError, RecordReader, class_label

IMAGE_SHAPE = (112, 112, 3)
_EXACT_FLOAT32 = 1 << 24  # float32 holds every integer up to here

ImageLayout = namedtuple("ImageLayout", ["keys", "num_classes"])


def is_image(payload):
    """Whether the bytes begin as a JPEG or a PNG does."""
    return payload[:3] == b"\xff\xd8\xff" or payload[:4] == b"\x89PNG"


def decode_image(payload, out=None):
    """RGB uint8 [112, 112, 3] of a JPEG or PNG, written into `out` where given.

    Raises `ValueError` for bytes that are not a whole image (OpenCV alone would fill the missing end of a JPEG with
    grey) and for images of another size.
    """
    # The end marker cannot occur inside JPEG scan data, where 0xff is always followed by a zero or a restart number.
    cut_short = payload[:3] == b"\xff\xd8\xff" and b"\xff\xd9" not in payload[-64:] and b"\xff\xd9" not in payload
    image = None if cut_short or not payload else cv2.imdecode(np.frombuffer(payload, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"its {len(payload)} bytes do not decode as an image")
    if image.shape != IMAGE_SHAPE:
        raise ValueError(f"image is {image.shape[1]} x {image.shape[0]}, not 112 x 112: align the faces first")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out)


def image_layout(reader):
    """Which records of a training set are images, and how many classes it states.

    Returns `ImageLayout(keys, num_classes)`: keys in record order, a range or an int64 array; None for classes that
    are not stated. Raises `RecordError` where header record and index disagree.

    Record 0 is a header where its flag is > 0 and it holds no image. Its label[0] is the key after the last image;
    the images have the keys 1 ... label[0] - 1. Two forms exist, told apart by the keys that follow:

    - insightface's own (MS1M-V3: label = 5179511, 5272942): identity records have the keys label[0] ... label[1] - 1,
      so that label[1] - label[0] is the number of classes;
    - the form that `tools/split_dataset` writes: no key follows, label[1] is the number of classes.

    Labels are float32, exact only up to 2**24, so the counts are taken from the index, and the header must round to
    them. Without a header every key is an image, in the order of the index, and the number of classes is not stated.
    """
    header, payload = reader.read_record(0) if 0 in reader else (IRHeader(0, 0.0, 0, 0), b"")
    if header.flag == 0 or is_image(payload):
        return ImageLayout(reader.keys, None)
    counts = [float(value) for value in header.label[:2]]
    says = f"{reader.path}: key 0 at offset {reader.offset(0)}: the header record says label = {counts}"
    if any(not (value >= 1 and value.is_integer()) for value in counts):
        raise RecordError(f"{says}, which are no counts; write the set anew")
    gap = reader.first_missing_key()
    if gap is not None:
        raise RecordError(f"{says}, but key {gap} is not in {reader.idx_path.name}; copy or write the index anew")
    end = len(reader)  # the keys are 0 ... end - 1
    first_identity = _first_identity(reader, counts, end)
    if first_identity is not None:
        return ImageLayout(range(1, first_identity), end - first_identity)
    if np.float32(end) != counts[0]:
        raise RecordError(f"{says}, but {reader.idx_path.name} has the keys 0 to {end - 1}: one of them is not its own")
    if counts[-1] > _EXACT_FLOAT32:
        raise RecordError(f"{says}; so many classes cannot be told apart by float32 labels")
    return ImageLayout(range(1, end), int(counts[1]) if len(counts) == 2 else None)


def _first_identity(reader, counts, end):
    """The key of the first identity record where a set of keys 0 ... end - 1 is of insightface's form, else None."""
    if len(counts) < 2 or np.float32(end) != counts[1] or counts[0] > counts[1]:
        return None
    if counts[0] <= _EXACT_FLOAT32:
        return int(counts[0]) if counts[0] < end else None
    # Inexact: the identity records, which hold no image, begin at a key that rounds to label[0].
    reach = int(np.spacing(np.float32(counts[0])))
    for key in range(int(counts[0]) - reach, min(int(counts[0]) + reach + 1, end)):
        if np.float32(key) == counts[0] and not reader.read_record(key)[1]:
            return key if reader.read_record(key - 1)[1] else None
    return None


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


class RecordDataset(Dataset):
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
        self._reader = RecordReader(self.path)
        self._reader.check()
        self._keys, stated_classes = image_layout(self._reader)
        self._labels = None
        self.num_image = len(self._keys)
        self.num_classes = stated_classes or num_classes or 0
        self._agree("num_image", num_image, self.num_image)
        self._agree("num_classes", num_classes, self.num_classes)
        if not self.num_classes:
            self.num_classes = int(self.labels().max(initial=-1)) + 1

    def __len__(self):
        return self.num_image

    def __getitem__(self, row):
        key = self._key(row)
        image = np.empty(IMAGE_SHAPE, np.uint8)
        label = self._load(key, image)
        return torch.from_numpy(image), label, int(row)

    def __getstate__(self):
        return self.__dict__ | {"_labels": None}

    def batch(self, rows):
        """Images uint8 [B, 112, 112, 3], labels int64 [B] and index int64 [B] of the given rows."""
        images = np.empty((len(rows), *IMAGE_SHAPE), np.uint8)
        labels = [self._load(self._key(row), image) for row, image in zip(rows, images)]
        return torch.from_numpy(images), torch.tensor(labels), torch.as_tensor(rows, dtype=torch.int64)

    def label(self, row):
        """The class of a row; reads the record's header only."""
        key = self._key(row)
        return self._checked(class_label(self._reader.read_header(key)), key)

    def labels(self):
        """The classes of all rows, int64 [N]. Scans all headers once, then remembers."""
        if self._labels is None:
            labels = np.empty(self.num_image, np.int64)
            step = 1 << 16
            with tqdm(total=len(labels), desc=f"labels of {self.path.name}", unit="rec", disable=None) as bar:
                for start in range(0, len(labels), step):
                    found = self._reader.read_labels(self._keys[start:start + step])
                    labels[start:start + step] = self._all_checked(found, start)
                    self._reader.release()
                    bar.update(len(found))
            self._labels = labels
        return self._labels

    def _key(self, row):
        if not 0 <= row < self.num_image:
            raise IndexError(f"{self.path}: row {row} is outside the set of {self.num_image} images")
        return int(self._keys[row])

    def _load(self, key, out):
        """Decode record `key` into `out`; its label."""
        header, payload = self._reader.read_record(key)
        try:
            decode_image(payload, out)
        except (ValueError, cv2.error) as error:
            raise RecordError(f"{self.path}: key {key} at offset {self._reader.offset(key)}: {error}") from None
        return self._checked(class_label(header), key)

    def _checked(self, label, key):
        if label >= 0 and label % 1 == 0 and (label < self.num_classes or not self.num_classes):
            return int(label)
        raise RecordError(
            f"{self.path}: key {key} at offset {self._reader.offset(key)}: label {label:.10g} is not a class"
            + (f"; there are {self.num_classes}, 0 to {self.num_classes - 1}" if self.num_classes else "")
        )

    def _all_checked(self, labels, start):
        wrong = ~((labels >= 0) & (labels < (self.num_classes or np.inf)) & (np.mod(labels, 1) == 0))
        if wrong.any():
            first = int(np.argmax(wrong))
            self._checked(float(labels[first]), self._key(start + first))
        return labels

    def _agree(self, name, stated, found):
        if stated and stated != found:
            raise RecordError(
                f"{self.path}: {name} is {found} by its header record and index, the config says {stated}; "
                f"set {name} = {found}, or 0 to take it from the file"
            )


class SyntheticDataset(Dataset):
    """Random images with the surface of `RecordDataset`, for measuring speed without data (rec = "synthetic")."""

    def __init__(self, rec="synthetic", num_classes=None, num_image=None):
        if not num_classes or not num_image:
            raise ValueError(f"rec = \"synthetic\" needs num_classes and num_image, got {num_classes} and {num_image}")
        self.path = pathlib.Path(rec)
        self.num_classes, self.num_image = int(num_classes), int(num_image)
        self._noise = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)

    def __len__(self):
        return self.num_image

    def __getitem__(self, row):
        images, labels, index = self.batch([row])
        return images[0], int(labels[0]), int(index[0])

    def batch(self, rows):
        """As `RecordDataset.batch`; an image is a stretch of noise whose place follows from its row."""
        if len(rows) and not 0 <= min(rows) <= max(rows) < self.num_image:
            raise IndexError(f"rows {min(rows)} to {max(rows)} reach outside the set of {self.num_image} images")
        size = int(np.prod(IMAGE_SHAPE))
        starts = [int(row) * 7919 % (len(self._noise) - size) for row in rows]
        images = np.empty((len(rows), *IMAGE_SHAPE), np.uint8)
        for image, start in zip(images, starts):
            image.reshape(-1)[:] = self._noise[start:start + size]
        rows = torch.as_tensor(rows, dtype=torch.int64)
        return torch.from_numpy(images), rows % self.num_classes, rows

    def label(self, row):
        return int(row) % self.num_classes

    def labels(self):
        return np.arange(self.num_image, dtype=np.int64) % self.num_classes


class _Batches(Dataset):
    """What the workers run: `(rows, mirrored)` -> `(images, labels, index, mirrored)`, a whole batch at a time."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, item):
        rows, mirrored = item
        return *self.dataset.batch(rows), torch.from_numpy(mirrored)


def _one_thread(worker):
    cv2.setNumThreads(0)  # the workers are the parallelism


def to_input(images, mirrored=None):
    """uint8 [B, 112, 112, 3] -> float32 [B, 3, 112, 112] in [-1, 1]: (x/255 - 0.5)/0.5.

    Images whose entry in `mirrored`, bool [B], is True are flipped left to right.
    """
    if mirrored is not None:
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(2), images)
    images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return images.div_(255).sub_(0.5).div_(0.5)


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

    def __init__(self, dataset, plan, device, num_workers):
        if plan.batch_size < 1:
            raise ValueError(f"batch_size is {plan.batch_size}, it must be at least 1")
        self.dataset, self.device = dataset, torch.device(device)
        self._plan = plan
        self._batches = DataLoader(
            _Batches(dataset),
            batch_size=None,
            sampler=plan,
            num_workers=num_workers,
            worker_init_fn=_one_thread,
            persistent_workers=num_workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else every epoch would draw from the generator that the training uses
        )

    def __len__(self):
        """Steps of a whole epoch, the same on every rank."""
        return len(self._plan)

    def __iter__(self):
        if self.device.type == "cuda":
            return self._one_ahead()
        return map(self._on_device, self._batches)

    def _on_device(self, batch):
        images, labels, index, mirrored = batch
        images = images.to(self.device, non_blocking=True)
        mirrored = mirrored.to(self.device, non_blocking=True) if len(mirrored) else None
        return to_input(images, mirrored), labels.to(self.device, non_blocking=True), index

    def _one_ahead(self):
        """Copy and prepare each batch on a stream of its own while the one before it is computed with."""
        stream, waiting = torch.cuda.Stream(self.device), None
        for batch in self._batches:
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
