"""The training set: which records of a `.rec` file are images, their pixels and labels, and the network's input.

`RecordDataset` and `SyntheticDataset` return images by row; engine/loader.py batches them on the device.
"""

import pathlib
import struct
from collections import namedtuple

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from core.manifest import record_digest
from recordio import IRHeader, RecordError, RecordReader, class_label

IMAGE_SHAPE = (112, 112, 3)
_MOST_BYTES = 1 << 20  # the pixels are 37,632 bytes; a JPEG of this size could demand 100,000 passes over them
_MOST_SEGMENTS = 1000  # before the one with the size; a photo with all its metadata has a few dozen
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_BEGIN = _PNG_SIGNATURE + b"\0\0\0\rIHDR"
_CHUNK = struct.Struct(">I4s")  # length and type; contents and a four-byte checksum follow
_WIDTH_HEIGHT, _HEIGHT_WIDTH = struct.Struct(">II"), struct.Struct(">HH")
_SIZED_SEGMENTS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOF0 ... SOF15 of ITU-T T.81, table B.1
_SKIPPED_SEGMENTS = frozenset({0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE})  # DHT DAC DQT DRI APPn COM
_EXACT_FLOAT32 = 1 << 24  # float32 is exact for every integer up to here

ImageLayout = namedtuple("ImageLayout", ["keys", "num_classes"])


def open_train_set(rec, num_classes=None, num_image=None):
    """`RecordDataset`, or `SyntheticDataset` if `rec` is "synthetic". Counts of None or 0 come from the file."""
    return (SyntheticDataset if str(rec) == "synthetic" else RecordDataset)(rec, num_classes, num_image)


def _resolve(rec):
    """The `.rec` file for a path with or without the suffix, or of a directory with `train.rec`."""
    rec = pathlib.Path(rec)
    candidates = [rec / "train.rec", rec.with_name(rec.name + ".rec"), rec]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{rec}: neither a .rec file (suffix optional) nor a directory with train.rec")
    return found


class _ImageSet(Dataset):
    """Single items through the subclass's `fill`, which decodes many rows."""

    def __len__(self):
        return self.num_image

    def __getitem__(self, row):
        image = np.empty((1, *IMAGE_SHAPE), np.uint8)
        label = self.fill([row], image)[0]
        return torch.from_numpy(image[0]), int(label), int(row)

    def _inside(self, row):
        if not 0 <= row < self.num_image:
            raise IndexError(f"{self.path}: row {row} is out of range, the set has {self.num_image} images")
        return int(row)


class RecordDataset(_ImageSet):
    """The images of a `.rec` training set in record order.

    An item is `(image, label, index)`: RGB uint8 [112, 112, 3], class in [0, num_classes), and its row, the same as in
    the feature files.

    rec: the `.rec`, with or without its suffix, or a directory with `train.rec`.
    num_classes, num_image: None or 0 = from the header record, or from all labels if there is none.

    Raises `RecordError` if a given count differs from the file's, and, naming file, key and offset, for a record that
    is damaged, does not decode, is not 112 x 112 or has a label outside [0, num_classes).
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
        """Decode the rows into `images`, NumPy uint8 [B, 112, 112, 3], RGB; returns their labels, int64 [B]."""
        labels = np.empty(len(rows), np.int64)
        for i, row in enumerate(rows):
            bgr, labels[i] = self._load(int(self.keys[self._inside(row)]))
            cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB, dst=images[i])
        return labels

    def digest(self):
        """Digest of the set, for manifests: the same wherever it lies."""
        return record_digest(self.path, self.reader.idx_path)

    def label(self, row):
        """The class of a row; reads only the record's header."""
        key = int(self.keys[self._inside(row)])
        return self._checked(class_label(self.reader.read_header(key)), key)

    def labels(self):
        """The classes of all rows, int64 [N], from one scan of all headers; cached."""
        if self._labels is None:
            labels = np.empty(self.num_image, np.int64)
            step = 1 << 14
            with tqdm(total=len(labels), desc=f"labels of {self.path.name}", unit="rec", disable=None) as bar:
                for start in range(0, len(labels), step):
                    found = self.reader.read_labels(self.keys[start : start + step])
                    wrong = ~((found >= 0) & (found < (self.num_classes or np.inf)) & (np.mod(found, 1) == 0))
                    for i in np.flatnonzero(wrong)[:1]:
                        self._checked(float(found[i]), self.keys[start + i])
                    labels[start : start + step] = found
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
                f"{self.path}: {name} is {found} in the file, but {stated} in the config; "
                f"set {name} = {found}, or 0 to take it from the file"
            )


class SyntheticDataset(_ImageSet):
    """Random images with the interface of `RecordDataset`, to measure speed without data (rec = "synthetic")."""

    def __init__(self, rec="synthetic", num_classes=None, num_image=None):
        if not num_classes or not num_image:
            raise ValueError(f'rec = "synthetic" needs num_classes and num_image, got {num_classes} and {num_image}')
        self.path = pathlib.Path(rec)
        self.num_classes, self.num_image = int(num_classes), int(num_image)
        self._noise = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)

    def fill(self, rows, images):
        """As `RecordDataset.fill`; an image is a slice of fixed noise at an offset derived from its row."""
        for row, image in zip(rows, images):
            start = self._inside(row) * 7919 % (len(self._noise) - image.size)
            image.reshape(-1)[:] = self._noise[start : start + image.size]
        return np.asarray(rows, np.int64) % self.num_classes

    def digest(self):
        return f"synthetic {self.num_classes} {self.num_image}"

    def label(self, row):
        return self._inside(row) % self.num_classes

    def labels(self):
        return np.arange(self.num_image, dtype=np.int64) % self.num_classes


# --- Which records are images -----------------------------------------------------------------------------------------


def is_image(payload):
    """Whether the bytes start like a JPEG or PNG."""
    return payload[:3] == b"\xff\xd8\xff" or payload[:4] == b"\x89PNG"


def image_layout(reader):
    """Which records of a training set are images, and its number of classes.

    Returns `ImageLayout(keys, num_classes)`: keys in record order, a range or an int64 array; num_classes is None if
    the file does not state it. Raises `RecordError` if header record and index disagree.

    Record 0 is a header record if its flag is > 0 and it has no image; without one every key is an image, in index
    order. The images have the keys 1 ... label[0] - 1. In insightface's own sets (MS1M-V3: label = 5179511, 5272942)
    identity records follow, one per class, with the keys label[0] ... label[1] - 1. In sets written by
    `tools/split_dataset` none follow, and label[1] is the number of classes. float32 is exact only up to 2**24, so
    the counts come from the index, and the labels must round to them.
    """
    header, payload = reader.read_record(0) if 0 in reader else (IRHeader(0, 0.0, 0, 0), b"")
    if header.flag == 0 or is_image(payload):
        return ImageLayout(reader.keys, None)
    counts = [float(value) for value in header.label[:2]]
    says = f"{reader.path}: key 0 at offset {reader.offset(0)}: the header record has label = {counts}"
    if any(not (value >= 1 and value.is_integer()) for value in counts):
        raise RecordError(f"{says}, not counts; rewrite the set")
    gap = reader.first_missing_key()
    if gap is not None:
        raise RecordError(f"{says}, but key {gap} is not in {reader.idx_path.name}; copy or rewrite the index")
    end = len(reader)  # the keys are 0 ... end - 1
    first_identity = _first_identity(reader, counts, end)
    if first_identity is not None:
        return ImageLayout(range(1, first_identity), end - first_identity)
    if np.float32(end) != counts[0]:
        raise RecordError(f"{says}, but {reader.idx_path.name} has keys 0 to {end - 1}: .rec and .idx do not match")
    if len(counts) == 2 and counts[1] > _EXACT_FLOAT32:
        raise RecordError(f"{says}; float32 labels cannot tell that many classes apart")
    return ImageLayout(range(1, end), int(counts[1]) if len(counts) == 2 else None)


def _first_identity(reader, counts, end):
    """Key of the first identity record if a set with keys 0 ... end - 1 has insightface's layout, else None."""
    if len(counts) < 2 or np.float32(end) != counts[1] or counts[0] > counts[1]:
        return None
    if counts[0] < _EXACT_FLOAT32:  # 2**24 itself may be a rounded 2**24 + 1
        return int(counts[0]) if counts[0] < end else None
    # Inexact: identity records, which have no image, start at a key that rounds to label[0].
    reach = int(np.spacing(np.float32(counts[0])))
    for key in range(int(counts[0]) - reach, min(int(counts[0]) + reach + 1, end)):
        if np.float32(key) == counts[0] and not reader.read_record(key)[1]:
            return key if reader.read_record(key - 1)[1] else None
    return None


# --- An encoded image -------------------------------------------------------------------------------------------------


def image_size(data):
    """`(width, height)` from the header of a JPEG or PNG, bytes or a uint8 array; None for anything else.

    Nothing is decoded: it takes a few microseconds, whatever size the header declares.
    """
    view = memoryview(data)
    if len(view) >= 24 and view[:16] == _PNG_BEGIN:
        return _WIDTH_HEIGHT.unpack_from(view, 16)
    return _jpeg_size(view) if view[:2] == b"\xff\xd8" else None


def _jpeg_size(view):
    """Walk the segments as strictly as the decoder, so that both find the same size; None for any other order."""
    at = 2
    for _ in range(_MOST_SEGMENTS):
        if at + 9 > len(view) or view[at] != 0xFF:
            return None
        marker = view[at + 1]
        if marker in _SIZED_SEGMENTS:
            return _HEIGHT_WIDTH.unpack_from(view, at + 5)[::-1]
        if marker in _SKIPPED_SEGMENTS:
            at += 2 + (view[at + 2] << 8 | view[at + 3])
        elif marker == 0xFF:  # a fill byte
            at += 1
        else:
            return None
    return None


def decode_bgr(data):
    """Decode a JPEG or PNG, a uint8 array: [112, 112, 3], BGR.

    Raises `ValueError` for a truncated image (OpenCV would fill the missing end of a JPEG with grey), for more than
    1 MiB and, before any pixel is allocated, for a header with another size.
    """
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{len(data)} bytes are too many for 112 x 112 pixels: align the faces first")
    size = image_size(data)
    if size is not None and size != IMAGE_SHAPE[1::-1]:
        raise ValueError(f"image is {size[0]} x {size[1]}, not 112 x 112: align the faces first")
    whole = whole_image(data) if size else None
    try:
        image = cv2.imdecode(whole, cv2.IMREAD_COLOR) if whole is not None else None
    except cv2.error:
        image = None
    if image is None or image.shape != IMAGE_SHAPE:
        raise ValueError(f"{len(data)} bytes that do not decode as an image")
    return image


def whole_image(data):
    """`data`, a JPEG or PNG, cut after a PNG's last chunk; None if a JPEG's end marker or that chunk is missing.

    JPEG scan data cannot contain the marker: 0xff is always followed by a zero or a restart number. OpenCV allocates
    and fills the declared length of a PNG chunk, up to 2 GB, before it notices a truncated file, and it reads chunks
    beyond the last one.
    """
    if data[0] == 0xFF:
        return data if b"\xff\xd9" in data[-64:].tobytes() or b"\xff\xd9" in data.tobytes() else None
    view, at = memoryview(data), len(_PNG_SIGNATURE)
    while at + 12 <= len(view):
        length, kind = _CHUNK.unpack_from(view, at)
        at += 12 + length
        if kind == b"IEND":
            return data[:at] if at <= len(view) else None
    return None


# --- The network's input ----------------------------------------------------------------------------------------------


def to_input(images, mirrored=None):
    """uint8 [B, 112, 112, 3] -> float32 [B, 3, 112, 112] in [-1, 1]: (x/255 - 0.5)/0.5.

    Images whose entry in `mirrored`, bool [B], is True are flipped left to right.
    """
    if images.device.type == "cpu":
        return _to_input_by_image(images, [False] * len(images) if mirrored is None else mirrored.tolist())
    return _to_input_by_batch(images, mirrored)


def _to_input_by_batch(images, mirrored):
    if mirrored is not None:
        # Indexing both versions by row, unlike masking, copies whole images and needs no host sync.
        row = torch.arange(len(images), device=images.device)
        images = torch.cat([images, images.flip(2)]).index_select(0, row + len(images) * mirrored)
    images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return images.mul_(1 / 127.5).sub_(1)


def _to_input_by_image(images, mirrored):
    """Far cheaper than by batch on the CPU: an image stays in cache, and no threads wait for each other."""
    count, height, width, channels = images.shape
    result = torch.empty((count, channels, height, width), dtype=torch.float32)
    planes = np.empty((channels * height, width), np.uint8)
    for image, mirror, out in zip(images.numpy(), mirrored, result.view(count, *planes.shape).numpy()):
        cv2.split(image, list(planes.reshape(channels, height, width)))  # writes into `planes`
        np.copyto(out, cv2.flip(planes, 1) if mirror else planes)
        out *= np.float32(1 / 127.5)
        out -= 1
    return result
