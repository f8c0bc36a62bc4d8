"""The training set: which records of a `.rec` file are images, their pixels and labels, and the network's input.

`RecordDataset` and `SyntheticDataset` return images by row; engine/loader.py batches them on the device.
"""

import contextlib
import os
import pathlib
import re
import shlex
import struct
from collections import namedtuple

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from core.manifest import record_digest
from recordio import IRHeader, RecordError, RecordReader

IMAGE_SHAPE = (112, 112, 3)
_MOST_BYTES = 1 << 20  # the pixels are 37,632 bytes
_MOST_SEGMENTS = 1000  # a photo with all its metadata has a few dozen; each scan is a pass over the whole image
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_BEGIN = _PNG_SIGNATURE + b"\0\0\0\rIHDR"
_CHUNK = struct.Struct(">I4s")  # length and type; contents and a four-byte checksum follow
_WIDTH_HEIGHT, _HEIGHT_WIDTH = struct.Struct(">II"), struct.Struct(">HH")
_SCAN, _APP1, _FILL = 0xDA, 0xE1, 0xFF  # markers of ITU-T T.81, table B.1
_FRAME_HEADERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_SEGMENTS = frozenset({*range(0xC0, 0xF0), 0xFE} - {0xC8, *range(0xD0, 0xDA)})  # those with a length
_BEHIND_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in scan data 0xff is followed by 0 or a restart number
_FORMATS = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"BM": "BMP", b"GIF8": "GIF", b"RIFF": "WebP"}
_FORMATS |= {b"II*\0": "TIFF", b"MM\0*": "TIFF"}
_EXACT_FLOAT32 = 1 << 24  # float32 is exact for every integer up to here

_walked = [(b"\0", None)]  # the bytes before the scan of the JPEG walked last, and what the walk has found there
ImageLayout = namedtuple("ImageLayout", ["keys", "num_classes"])
ImageHeader = namedtuple("ImageHeader", ["size", "end", "turned"])


def open_train_set(rec, num_classes=None, num_image=None):
    """`RecordDataset`, or `SyntheticDataset` if `rec` is "synthetic". Counts of None or 0 come from the file."""
    return (SyntheticDataset if str(rec) == "synthetic" else RecordDataset)(rec, num_classes, num_image)


def _resolve(rec):
    """The `.rec` file for a path with or without the suffix, or of a directory with `train.rec`."""
    rec = pathlib.Path(rec)
    candidates = [rec / "train.rec", rec.with_name(rec.name + ".rec"), rec]
    found = next((path for path in candidates if os.path.isfile(path)), None)
    if found is not None:
        return found
    if part := re.fullmatch(r"train_part_([1-9][0-9]?)_(class|data)(\.rec)?", rec.name):
        share = min(int(part[1]), 100 - int(part[1]))
        ratio = "" if share == 30 else f" --ratio {share / 100}"
        command = f"python tools/split_dataset/split_dataset_ms1mv3.py --root {shlex.quote(str(rec.parent))}{ratio}"
        raise FileNotFoundError(f"{rec}: no such part of the training set; write it: {command}")
    raise FileNotFoundError(f"{rec}: neither a .rec file (suffix optional) nor a directory with train.rec")


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

    Raises `RecordError` if a given count differs from the file's, if most classes have no image, for one-hot labels,
    and, naming file, key and offset, for a record that is damaged, does not decode, is not 112 x 112 or has a label
    outside [0, num_classes) or beyond float32's whole numbers. Classes without images are counted where all labels are
    read: here if there is no header record or it states more than two classes an image, else by `labels`.
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
        self._refuse_one_hot()
        if not 0 < self.num_classes <= 2 * self.num_image:
            self.num_classes = max(
                self.num_classes, 1 + max((int(found.max()) for _, found in self._scan()), default=-1)
            )

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
        return record_digest(self.path, self.reader.idx_path, self.reader.index.facts.get("digest"))

    def label(self, row):
        """The class of a row; decodes nothing."""
        key = int(self.keys[self._inside(row)])
        return self._checked(self.reader.read_image(key)[0], key)

    def labels(self):
        """The classes of all rows, int64 [N], from one scan of all headers; cached."""
        if self._labels is None:
            labels = np.empty(self.num_image, np.int64)
            for part, found in self._scan():
                labels[part] = found
            self._labels = labels
        return self._labels

    def _scan(self, step=1 << 14):
        """Yield `(rows as a slice, their classes int64 [n])` of the whole set, in order; refuse sparse ones."""
        used = np.zeros(self._end_of_classes(), bool)
        for start in tqdm(
            range(0, self.num_image, step), desc=f"labels of {self.path.name}", unit="block", disable=None
        ):
            part = slice(start, start + step)
            found = self.reader.read_labels(self.keys[part])
            wrong = ~((found >= 0) & (found < len(used)) & (np.mod(found, 1) == 0))
            for i in np.flatnonzero(wrong)[:1]:
                self._checked(float(found[i]), self.keys[start + int(i)])
            used[(found := found.astype(np.int64))] = True
            yield part, found
        self._refuse_sparse(used)

    def _refuse_sparse(self, used):
        """Ids such as a register's numbers, taken for classes, would train centres that no image ever comes near."""
        count, last = np.count_nonzero(used), int(np.max(np.flatnonzero(used), initial=-1))
        if 2 * count < (end := max(self.num_classes, last + 1)):
            raise RecordError(
                f"{self.path}: {self.num_image} images of {count} classes, labels up to {last}: most of the {end} "
                f"class centres would train without an image; write a set without gaps: "
                f"python tools/split_dataset/dense_classes.py {shlex.quote(str(self.path))}"
            )

    def _refuse_one_hot(self):
        """[0, 0, 1] would be read as class 0, followed by two other numbers. Records spread over the set tell."""
        labels = []
        for row in np.linspace(0, self.num_image - 1, min(self.num_image, 8)).astype(int):
            with contextlib.suppress(RecordError):  # raised where the record is read
                labels.append(np.ravel(self.reader.read_record(int(self.keys[row]))[0].label))
        if labels and all(len(label) > 1 and np.count_nonzero(label) == 1 == label.max() for label in labels):
            raise RecordError(f"{self.path}: one-hot labels; write the class itself, or the class before other numbers")

    def _load(self, key):
        label, data = self.reader.read_image(key)
        try:
            bgr = decode_bgr(data)
        except ValueError as error:
            raise RecordError(f"{self.path}: key {key} at offset {self.reader.offset(key)}: {error}") from None
        return bgr, self._checked(label, key)

    def _checked(self, label, key):
        end, why = self._end_of_classes(), ""
        if 0 <= label < end and label % 1 == 0:
            return int(label)
        if end == self.num_classes:
            why = f"; there are {end}, 0 to {end - 1}"
        elif label >= end:
            why = f"; float32 tells labels apart only up to {end - 1}: number the classes from 0 where the set is made"
        raise RecordError(
            f"{self.path}: key {key} at offset {self.reader.offset(key)}: label {label:.10g} is not a class{why}"
        )

    def _end_of_classes(self):
        return min(self.num_classes or _EXACT_FLOAT32, _EXACT_FLOAT32)

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


def image_layout(reader):
    """Which records of a training set are images, and its number of classes.

    Returns `ImageLayout(keys, num_classes)`: keys in record order, a range or like an int64 array; num_classes is
    None if the file does not state it. Raises `RecordError` if header record and index disagree.

    Record 0 is a header record if its flag is > 0 and it has no image; without one every key is an image, in index
    order. The images have the keys 1 ... label[0] - 1. In insightface's own sets (MS1M-V3: label = 5179511, 5272942)
    identity records follow, one per class, with the keys label[0] ... label[1] - 1. In sets written by
    `tools/split_dataset` none follow, and label[1] is the number of classes. float32 is exact only up to 2**24, so
    the counts come from the index, and the labels must round to them.
    """
    header, payload = reader.read_record(0) if 0 in reader else (IRHeader(0, 0.0, 0, 0), b"")
    if header.flag == 0 or image_format(payload):
        return ImageLayout(reader.index.keys, None)
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


def image_format(data):
    """The name of the format by the first bytes: "JPEG", "PNG", "BMP", "GIF", "WebP", "TIFF", or None."""
    first = bytes(data[:4])
    return next((name for start, name in _FORMATS.items() if first.startswith(start)), None)


def image_header(data):
    """What is known of a JPEG or PNG, bytes or a uint8 array, without decoding it: `ImageHeader(size, end, turned)`.

    size: (width, height); end: the offset behind its end marker or last chunk; each None if it is not there. turned:
    whether MXNet 1.9.1 turns the image as its EXIF says. Takes microseconds, whatever size the header declares.
    """
    view = memoryview(data)
    if view[:16] == _PNG_BEGIN and len(view) >= 24:
        return ImageHeader(_WIDTH_HEIGHT.unpack_from(view, 16), _png_end(view), False)
    return _jpeg_header(view) if view[:2] == b"\xff\xd8" else ImageHeader(None, None, False)


def _jpeg_header(view):
    """Walk the segments as strictly as the decoder, to the end marker behind the scans: a thumbnail has one, too.

    Cameras write EXIF directly after the start: obeyed. PIL and other re-encoders write it behind a JFIF segment:
    ignored, as it is behind another APP1 segment or a fill byte. OpenCV answers otherwise, each version its own way.
    """
    start, state = _walked[0]  # the images of a set mostly begin alike, up to their scan
    at, size, exif = state if view[: len(start)] == start else (2, None, None)
    for _ in range(_MOST_SEGMENTS):
        if at + 4 > len(view) or view[at] != 0xFF:
            break
        marker = view[at + 1]
        if marker == _FILL:
            at, exif = at + 1, exif or False
            continue
        if marker not in _SEGMENTS:
            break
        if marker in _FRAME_HEADERS and at + 9 <= len(view):
            size = size or _HEIGHT_WIDTH.unpack_from(view, at + 5)[::-1]
        elif marker == _APP1 and exif is None:
            exif = view[at + 4 : at + 10] == b"Exif\0\0"
        elif marker == _SCAN and at != len(start) and at < 1 << 12:
            _walked[0] = bytes(view[:at]), (at, size, exif)
        at += 2 + (view[at + 2] << 8 | view[at + 3])
        if marker == _SCAN:
            behind = _BEHIND_SCAN.search(view, at)
            at = behind.start() if size and behind else len(view)
    end = at + 2 if view[at : at + 2] == b"\xff\xd9" else None
    return ImageHeader(size, end, exif is True and view[6:11] != b"JFIF\0")


def _png_end(view):
    """OpenCV allocates and fills the declared length of a chunk, up to 2 GB, before it notices a truncated file, and it
    reads chunks beyond the last one.
    """
    at = len(_PNG_SIGNATURE)
    while at + 12 <= len(view):
        length, kind = _CHUNK.unpack_from(view, at)
        at += 12 + length
        if kind == b"IEND":
            return at if at <= len(view) else None
    return None


def decode_bgr(data):
    """Decode a JPEG or PNG, a uint8 array: [112, 112, 3], BGR, turned or not as MXNet 1.9.1 does.

    Raises `ValueError` for other formats, for a truncated image (OpenCV before 4.11 fills the rest of a JPEG with the
    image decoded before it), for more than 1 MiB and, before any pixel is allocated, for a header with another size.
    """
    size, end, turned = image_header(data)
    if size is not None and size != IMAGE_SHAPE[1::-1]:
        raise ValueError(f"image is {size[0]} x {size[1]}, not 112 x 112: align the faces first")
    if size is None and (kind := image_format(data)) not in (None, "JPEG", "PNG"):
        raise ValueError(f"a {kind} image; only JPEG and PNG are read: convert it to PNG with OpenCV or Pillow")
    if end is not None and end > _MOST_BYTES:
        raise ValueError(f"{end} bytes are too many for 112 x 112 pixels: align the faces first")
    image = None
    if size is not None and end is not None:
        with contextlib.suppress(cv2.error):
            image = cv2.imdecode(data[:end], cv2.IMREAD_COLOR | (0 if turned else cv2.IMREAD_IGNORE_ORIENTATION))
    if image is None or image.shape != IMAGE_SHAPE:
        raise ValueError(f"{len(data)} bytes that do not decode as an image")
    return image


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
    levels = np.arange(256, dtype=np.float32) * np.float32(1 / 127.5) - np.float32(1)
    for image, mirror, out in zip(images.numpy(), mirrored, result.view(count, *planes.shape).numpy()):
        cv2.split(image, list(planes.reshape(channels, height, width)))  # writes into `planes`
        cv2.LUT(cv2.flip(planes, 1) if mirror else planes, levels, dst=out)
    return result
