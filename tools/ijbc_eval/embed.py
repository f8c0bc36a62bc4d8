"""Embeddings of all images of a set: read and aligned in worker processes, computed once per model and cached."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import sys
import zlib

import numpy as np
from tqdm import tqdm

from backbones.model_files import Preprocessing, load_model
from core.files import remove_leftovers, reserve
from engine.workers import FileSize, Workers, shared_slots
from tools.ijbc_eval.align import SIZE
from tools.ijbc_eval.files import EvalError, sha256_of, writing
from tools.ijbc_eval.images import UnusableImage
from tools.ijbc_eval.stored import StoredFeatures
from tools.ijbc_eval.templates import LARGEST

# Part of the cache key: change it with any change between an image file and the model's input.
_PIPELINE = "similarity-112-bilinear-rgb-{:.17g}/1"  # the input scale, every digit of it
_NAMED = 5  # bad images listed in a message; the result file lists them all


@dataclasses.dataclass
class Embeddings:
    """embs, embs_f float32 [N, D] (images and mirrored images, rows as in Faces.names), bad bool [N]: unusable."""

    embs: np.ndarray
    embs_f: np.ndarray
    bad: np.ndarray


class ImageBatches:
    """Item i: reads the i-th batch of an images.Images into a slot of memory shared with the main process, and says why
    images failed.
    """

    def __init__(self, source, batch_size, workers):
        self.source, self.batch_size = source, batch_size
        self.slots = shared_slots(workers, (batch_size, SIZE, SIZE, 3), np.uint8)

    def __len__(self):
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, item):
        """`(slot, a reason or "" for each image)`"""
        slot, reasons = item % len(self.slots), []
        first = item * self.batch_size
        rows = range(first, min(first + self.batch_size, len(self.source)))
        for row, image in zip(rows, self.slots[slot].numpy()):
            try:
                image[:], reason = self.source.read(row), ""
            except UnusableImage as error:
                image[:], reason = 0, str(error)
            reasons.append(reason)
        return slot, reasons


def image_batches(source, batch_size, workers):
    """Iterate over `(images, reasons)` of an images.Images in order, prepared by `workers` processes (0: in this one).

    images: uint8 [b, 112, 112, 3], RGB, black where its reason, why an image is unusable, is not "".
    Raises WorkerError if a worker cannot start or dies.
    """
    batches = ImageBatches(source, batch_size, workers)
    of_workers = Workers(batches, range(len(batches)), FileSize(source.folder), workers, "--workers")
    for slot, reasons in of_workers.received():
        yield batches.slots[slot, : len(reasons)].clone(), reasons


class EmbeddingStore:
    """Embeddings of models on one evaluation set, cached in `cache_dir/embeddings` by contents of models and images."""

    def __init__(
        self,
        evaluation_set,
        faces,
        cache_dir,
        batch_size=128,
        workers=2,
        skip_bad=False,
        fresh=False,
        device=None,
        input_scale=None,
    ):
        self.set, self.images, self.cache_dir = evaluation_set, evaluation_set.images(faces), pathlib.Path(cache_dir)
        self.batch_size, self.workers = batch_size, workers
        self.skip_bad, self.fresh, self.device = skip_bad, fresh, device
        self.input_scale = input_scale or evaluation_set.input_scale
        self._digests, self._loaded, self._found = {}, {}, {}
        for folder in ("embeddings", "meta"):
            remove_leftovers(self.cache_dir / folder)

    def digest(self, model_file):
        """Of the contents of the model's files, when first asked for: hex."""
        if model_file not in self._digests:
            self._digests[model_file] = sha256_of(model_file.paths)
        return self._digests[model_file]

    def preprocessing(self, model_file):
        """What a model is fed with, a Preprocessing; "stored" for stored features."""
        if isinstance(model_file, StoredFeatures):
            return "stored"
        return model_file.preprocessing or Preprocessing(std=self.input_scale)

    def width(self, model_file):
        """Embedding size of a model, from the cache or by loading the model."""
        if isinstance(model_file, StoredFeatures):
            return model_file.rows.shape[1]
        cached = self._cached(model_file)
        return cached.embs.shape[1] if cached else self._load(model_file).num_features

    def get(self, model_file):
        """Embeddings of the model, cached or computed. EvalError on unusable images, unless skip_bad.

        Of stored features: the rows of the images, which count as bad where there is none, and nothing mirrored.
        """
        if isinstance(model_file, StoredFeatures):
            features, there = model_file.of_images(self.images)
            return Embeddings(features, np.zeros_like(features), ~there)
        if self._cached(model_file) is None:
            self._found[model_file] = self._compute(model_file)
            self._loaded.pop(model_file, None)
        found = self._found[model_file]
        if found.bad.any() and not self.skip_bad:
            self._refuse({int(row): "" for row in np.flatnonzero(found.bad)})
        return found

    def _load(self, model_file):
        if model_file not in self._loaded:
            self._loaded[model_file] = load_model(model_file, self.device, self.preprocessing(model_file))
        return self._loaded[model_file]

    def _cached(self, model_file):
        """The stored Embeddings, memory-mapped, or None."""
        if model_file not in self._found:
            self._found[model_file] = None if self.fresh else self._read(model_file)
        return self._found[model_file]

    def _read(self, model_file):
        array = read_cache(*self._key(model_file), len(self.images))
        return None if array is None else Embeddings(*array, np.isnan(array[0, :, 0]))

    def _key(self, model_file):
        """`(path of the cache file, what it is made from)`"""
        pipeline = _PIPELINE.format(self.input_scale)
        if model_file.preprocessing:
            pipeline = f"{pipeline} {model_file.preprocessing}"
        key = f"{pipeline} {model_file.found_network} {self.digest(model_file)} {self.data_key}"
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self.cache_dir / "embeddings" / f"{name}.npy", key

    def _compute(self, model_file):
        model, count = self._load(model_file), len(self.images)
        path, key = self._key(model_file)
        with (
            cache_writer(path, key, (2, count, model.num_features)) as write,
            tqdm(total=count, desc=f"embed {model_file.name}", unit="img", disable=None, file=sys.stderr) as bar,
        ):
            row = 0
            for pixels, why in image_batches(self.images, self.batch_size, self.workers):
                both = np.stack([model(pixels), model(pixels.flip(2))])
                self._check_finite(both, row, model_file)
                bad = {row + place: reason for place, reason in enumerate(why) if reason}
                if bad and not self.skip_bad:  # fail now, not after hours
                    self._refuse(bad)
                both[:, [place - row for place in bad]] = np.nan
                write(row, both)
                row += len(pixels)
                bar.update(len(pixels))
        return self._read(model_file)

    def _check_finite(self, values, first, model_file):
        sound = (np.abs(values) < LARGEST).all(axis=(0, 2))
        if not sound.all():
            name = self.images.name(first + int(np.argmin(sound)))
            raise EvalError(f"{model_file.file}: the embedding of {name} is not finite; use another checkpoint")

    def _refuse(self, reasons):
        """EvalError with the first unusable images and their places in the set's list."""
        shown = []
        for row, why in sorted(reasons.items())[:_NAMED]:
            said = ", ".join(filter(None, (why, self.images.where(row))))
            shown.append(f"{self.images.path(row)}" + f" ({said})" * bool(said))
        more = f" and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
        raise EvalError(f"unusable image(s): {'; '.join(shown)}{more}; {self.images.remedy}")

    @functools.cached_property
    def data_key(self):
        """Digest of the images: names, contents and what else they are read by, such as landmarks.

        Hashing every image takes minutes at full size, so the digest is cached with the sizes and times of the files
        and recomputed only if one of those changes.
        """
        signature = self.images.signature()
        path = self.cache_dir / "meta" / f"{self.set.key}_images.json"
        if os.path.exists(path) and not self.fresh:
            try:
                saved, content, digest = json.loads(path.read_bytes())
                if digest != _digest(saved, content):
                    raise ValueError("its digest does not match")
                if saved == signature:
                    return content
            except Exception as error:  # whatever comes of damaged bytes
                print(f"{path}: damaged cache ({error}); reading the images again", file=sys.stderr)
        content = self.images.content()
        with writing(path) as file:
            file.write(json.dumps([signature, content, _digest(signature, content)]).encode())
        return content


def _digest(signature, content):
    return hashlib.sha256(f"{signature} {content}".encode()).hexdigest()


# --- The cache file -------------------------------------------------------------------------------------------------
# An array float32 [2, N, D] as np.save writes it, and behind it another: the checksums of its blocks, uint32. Each
# begins with what the embeddings are made from, so that another model's file does not pass under this one's name.

_BLOCK = 4 << 20  # bytes


@contextlib.contextmanager
def cache_writer(path, key, shape):
    """`with cache_writer(path, key, (2, N, D)) as write:` `write(row, float32 [2, b, D])` stores rows from `row` on.

    key: what the embeddings are made from. The file gets its name once it is complete and on disk. EvalError if it
    cannot be written, for want of room at once.
    """
    _, count, width = shape
    with writing(path) as file:
        reserve(file, 4 * math.prod(shape))
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        start = file.tell()

        def write(row, both):
            for plane, rows in enumerate(both):
                file.seek(start + 4 * width * (plane * count + row))
                file.write(np.ascontiguousarray(rows, "<f4"))

        yield write
        np.save(file, _checksums(file, start, shape, key))


def read_cache(path, key, count):
    """The array [2, `count`, D] in a cache file, memory-mapped; None, with a line if the file is not what was written.

    All of it is read for its checksums, which the templates need next anyway.
    """
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype.str != "<f4" or fortran_order or len(shape) != 3 or shape[:2] != (2, count):
                raise ValueError(f"it has {dtype} {shape}")
            start = file.tell()
            if not np.array_equal(_checksums(file, start, shape, key), np.load(file)):
                raise ValueError("its checksums do not match")
            return np.memmap(file, dtype, "r", start, shape)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever NumPy raises on damaged bytes
        print(f"{path}: damaged cache ({error}); embedding the images again", file=sys.stderr)
        return None


def _checksums(file, start, shape, key):
    """CRC-32 of each block of an array; leaves the file's position behind it."""
    left, first, sums = 4 * math.prod(shape), zlib.crc32(key.encode()), []
    file.seek(start)
    while left > 0 and (block := file.read(min(_BLOCK, left))):
        sums.append(zlib.crc32(block, first))
        left -= len(block)
    return np.array(sums, np.uint32)
