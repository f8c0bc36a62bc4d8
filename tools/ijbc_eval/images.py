"""The images of an evaluation set, as the models see them: RGB uint8 [112, 112, 3], one a row."""

import functools
import hashlib
import os
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from tqdm import tqdm

from dataset import decode_bgr, image_header
from tools.ijbc_eval.align import align, outside, similarity_matrices
from tools.ijbc_eval.files import EvalError, sha256_of, stamp


class UnusableImage(Exception):
    pass


def read_image(path):
    """An RGB image, uint8 [H, W, 3], of any format that OpenCV reads, decoded and turned as cv2.imread does.

    UnusableImage also for a truncated JPEG or PNG: OpenCV before 4.11 decodes what is there, and fills the rest with
    parts of the image decoded before it.
    """
    encoded = _read_bytes(path)
    size, end, _ = image_header(encoded)
    if size is not None and end is None:
        raise UnusableImage("truncated")
    image = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    if image is None:
        raise UnusableImage("cannot be decoded")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _read_bytes(path):
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UnusableImage(error.strerror) from None
    if not data:
        raise UnusableImage("empty file")
    return np.frombuffer(data, np.uint8)


def aligned_face(path, landmarks, matrix):
    """The aligned image, RGB uint8 [112, 112, 3]. landmarks [5, 2] (pixels) and their similarity matrix [2, 3].

    UnusableImage for an image that cannot be read, and for landmarks that cannot be its own.
    """
    image = read_image(path)
    size = image.shape[1::-1]
    if outside(landmarks, size):
        raise UnusableImage(f"its landmarks are outside the picture, {size[0]} x {size[1]} pixels")
    aligned = align(image, matrix)
    if not aligned.any():
        raise UnusableImage("black when aligned")
    return aligned


def decoded_crop(encoded):
    """An aligned crop, RGB uint8 [112, 112, 3], decoded as in training. encoded: uint8, a JPEG or PNG; else
    UnusableImage, for another size too."""
    try:
        return cv2.cvtColor(decode_bgr(encoded), cv2.COLOR_BGR2RGB)
    except ValueError as error:
        raise UnusableImage(str(error)) from None


class Images:
    """Image files: `names` [N] under `folder`. A subclass says how one is read.

    remedy: the next step for unusable ones; `_made_with`: bytes that what is read depends on beside the files.
    """

    remedy = ""
    _made_with = b""

    def __init__(self, folder, names):
        self.folder, self.names = pathlib.Path(folder), names

    def __len__(self):
        return len(self.names)

    def name(self, row):
        name = self.names[row]
        return name.decode() if isinstance(name, bytes) else str(name)

    def path(self, row):
        return self.folder / self.name(row)

    def read(self, row):
        """RGB uint8 [112, 112, 3]; UnusableImage says why not."""
        return decoded_crop(_read_bytes(self.path(row)))

    def first_copies(self):
        """The first row of the same image for each row, int [N], so far as that is known without decoding."""
        return np.arange(len(self))

    def where(self, row):
        """The row's place in a list, for messages; "" without one."""
        return ""

    def missing(self, row):
        return EvalError(f"{self.path(row)}: no such image; put it there")

    def signature(self):
        """Digest of the names, sizes and times of the files; EvalError if one is missing."""
        digest = hashlib.sha256()
        for row in range(len(self)):
            try:
                status = os.stat(self.path(row))
            except (FileNotFoundError, NotADirectoryError):
                raise self.missing(row) from None
            digest.update(f"{self.name(row)} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
        digest.update(self._made_with)
        return digest.hexdigest()

    def content(self):
        """Digest of names and contents."""
        digest = hashlib.sha256(self._made_with)
        bar = tqdm(total=len(self), desc="fingerprint of the images", unit="img", disable=None, file=sys.stderr)
        with bar, ThreadPoolExecutor(4) as pool:
            for start in range(0, len(self), 1024):
                part = range(start, min(start + 1024, len(self)))
                for row, content in zip(part, pool.map(_hash_file, map(self.path, part))):
                    digest.update(f"{self.name(row)} {content}\n".encode())
                bar.update(len(part))
        return digest.hexdigest()


def _hash_file(path):
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:  # reported with its line when the image is embedded
        return f"unreadable: {error.strerror}"


class LooseCrops(Images):
    """IJB's images, aligned by the landmarks of protocol.Faces, which `listed` lists."""

    remedy = "restore images and landmarks of one release, or skip all unusable images with --skip-bad-images"

    def __init__(self, folder, faces, listed):
        super().__init__(folder, faces.names)
        self.landmarks, self.listed = faces.landmarks, listed
        self._made_with = faces.landmarks.tobytes()

    @functools.cached_property
    def _matrices(self):
        return similarity_matrices(self.landmarks)

    def read(self, row):
        return aligned_face(self.path(row), self.landmarks[row], self._matrices[row])

    def where(self, row):
        return f"{self.listed.name} line {row + 1}"

    def signature(self):
        if not self.folder.is_dir():
            raise EvalError(f"{self.folder}: no such directory; put the cropped images there")
        return super().signature()

    def missing(self, row):
        return EvalError(
            f"{self.listed} line {row + 1}: image {self.path(row)} does not exist; unpack the images again, in the "
            "folders that the list names, or remove the line from both lists"
        )


class Crops(Images):
    """Aligned crops in files of their own. pairs: (list, ROOT) where a list names them."""

    remedy = "this takes aligned faces, as tools/make_dataset/folder_to_rec.py writes them: align or remove these"
    _made_with = b"aligned crops"

    def __init__(self, folder, names, pairs=None):
        super().__init__(folder, names)
        self.pairs = pairs

    def missing(self, row):
        if not self.pairs:
            return super().missing(row)
        listed, root = self.pairs
        return EvalError(f"{self.path(row)}: no such image; --pairs {listed} has it, below ROOT {root}: correct one")


class BinCrops(Crops):
    """The aligned crops in a .bin file. encoded: [bytes]; names: their positions."""

    remedy = "write the .bin file again"

    def __init__(self, path, encoded):
        super().__init__(path.parent, np.arange(len(encoded)).astype(str))
        self.file, self.encoded = path, encoded

    def path(self, row):
        return f"{self.file} image {row}"

    def read(self, row):
        return decoded_crop(np.frombuffer(self.encoded[row], np.uint8))

    def first_copies(self):
        rows = {}
        return np.array([rows.setdefault(bytes(data), row) for row, data in enumerate(self.encoded)])

    def signature(self):
        return str(stamp(self.file))

    def content(self):
        return sha256_of([self.file])
