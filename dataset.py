"""The training set in a `.rec` file, or a synthetic one: images by row. loader.py takes them to the device."""

import pathlib

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from image_bytes import IMAGE_SHAPE, decode_bgr
from image_layout import image_layout
from recordio import RecordError, RecordReader, class_label


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
        except ValueError as error:
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
