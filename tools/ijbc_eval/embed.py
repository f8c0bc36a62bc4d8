"""Embeddings of all images of a subset: read and aligned in worker processes, computed once per model and cached."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from tqdm import tqdm

from tools.ijbc_eval.align import SIZE, align, similarity_matrices
from tools.ijbc_eval.files import EvalError, publish, sha256_of
from tools.ijbc_eval.models import INPUT_SCALE, load_model

# Part of the cache key: change it with any change between an image file and the model's input.
_PIPELINE = "similarity-112-bilinear-rgb-{:.17g}/1"  # the input scale, every digit of it
_NAMED = 5  # bad images listed in a message; the result file lists them all


@dataclasses.dataclass
class Embeddings:
    """embs, embs_f float32 [N, D] (images and mirrored images, rows as in Faces.names), bad bool [N]: unreadable."""

    embs: np.ndarray
    embs_f: np.ndarray
    bad: np.ndarray


class UnreadableImage(Exception):
    pass


def read_image(path):
    """An RGB image, uint8 [H, W, 3]. UnreadableImage also for truncated files, which decoders would decode in part."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImage(error.strerror) from None
    if not data:
        raise UnreadableImage("empty file")
    end = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(data[:2])
    if end is not None and end not in data[-1024:]:
        raise UnreadableImage("truncated")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise UnreadableImage("cannot be decoded")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


class AlignedBatches(torch.utils.data.Dataset):
    """Item i: the i-th batch of aligned images, uint8 [b, 112, 112, 3], and why each is unreadable, or ""."""

    def __init__(self, image_dir, names, landmarks, batch_size):
        self.image_dir, self.names, self.batch_size = pathlib.Path(image_dir), names, batch_size
        self.matrices = similarity_matrices(landmarks)

    def __len__(self):
        return -(-len(self.names) // self.batch_size)

    def __getitem__(self, item):
        rows = range(item * self.batch_size, min((item + 1) * self.batch_size, len(self.names)))
        images, reasons = np.zeros((len(rows), SIZE, SIZE, 3), np.uint8), []
        for image, row in zip(images, rows):
            try:
                image[:] = align(read_image(self.image_dir / self.names[row].decode()), self.matrices[row])
                reasons.append("")
            except UnreadableImage as error:
                reasons.append(str(error))
        return torch.from_numpy(images), reasons


def _start_worker(_):
    cv2.setNumThreads(0)  # threads in each of many workers would only compete


def aligned_batches(image_dir, faces, batch_size, workers):
    """Iterate over AlignedBatches in order, prepared ahead by `workers` processes (0: in this one)."""
    dataset = AlignedBatches(image_dir, faces.names, faces.landmarks, batch_size)
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_start_worker,
        prefetch_factor=4 if workers else None,
    )


class EmbeddingStore:
    """Embeddings of models on one subset, cached in `cache_dir/embeddings` by the contents of model file and images."""

    def __init__(
        self,
        protocol,
        faces,
        cache_dir,
        batch_size=128,
        workers=2,
        skip_bad=False,
        fresh=False,
        device=None,
        input_scale=INPUT_SCALE,
    ):
        self.protocol, self.faces, self.cache_dir = protocol, faces, pathlib.Path(cache_dir)
        self.batch_size, self.workers = batch_size, workers
        self.skip_bad, self.fresh, self.device = skip_bad, fresh, device
        self.input_scale = input_scale
        self._loaded, self._done, self._paths = {}, {}, {}

    def width(self, model_file):
        """Embedding size of a model, from the cache or by loading the model."""
        cached = self._cached(model_file)
        return cached.shape[2] if cached is not None else self._load(model_file).num_features

    def get(self, model_file):
        """Embeddings of the model, cached or computed. EvalError on unreadable images, unless skip_bad."""
        if model_file not in self._done:
            array = self._cached(model_file)
            if array is None:
                array = self._compute(model_file)
                self._loaded.pop(model_file, None)
            bad = np.isnan(array[0, :, 0])
            if bad.any() and not self.skip_bad:
                self._refuse({int(row): "" for row in np.flatnonzero(bad)})
            self._done[model_file] = Embeddings(array[0], array[1], bad)
        return self._done[model_file]

    def _load(self, model_file):
        if model_file not in self._loaded:
            self._loaded[model_file] = load_model(model_file, self.device, self.input_scale)
        return self._loaded[model_file]

    def _path(self, model_file):
        if model_file not in self._paths:
            pipeline = _PIPELINE.format(self.input_scale)
            key = f"{pipeline} {model_file.found_network} {sha256_of(model_file.paths)} {self.data_key}"
            name = hashlib.sha256(key.encode()).hexdigest()[:32]
            self._paths[model_file] = self.cache_dir / "embeddings" / f"{name}.npy"
        return self._paths[model_file]

    def _cached(self, model_file):
        """The stored array [2, N, D], memory-mapped, or None."""
        path = self._path(model_file)
        if not path.exists() or (self.fresh and model_file not in self._done):
            return None
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            print(f"{path}: damaged cache ({error}); computing it again", file=sys.stderr)
            return None
        return array if array.ndim == 3 and array.shape[:2] == (2, len(self.faces.names)) else None

    def _compute(self, model_file):
        model, count, row = self._load(model_file), len(self.faces.names), 0
        path = self._path(model_file)
        with publish(path) as partial:
            array = np.lib.format.open_memmap(partial, "w+", np.float32, (2, count, model.num_features))
            batches = aligned_batches(self.protocol.image_dir, self.faces, self.batch_size, self.workers)
            with tqdm(total=count, desc=f"embed {model_file.name}", unit="img", disable=None, file=sys.stderr) as bar:
                for images, why in batches:
                    rows = slice(row, row + len(images))
                    array[0, rows], array[1, rows] = model(images), model(images.flip(2))
                    self._check_finite(array[:, rows], row, model_file)
                    bad = {row + place: reason for place, reason in enumerate(why) if reason}
                    if bad and not self.skip_bad:  # fail now, not after hours
                        self._refuse(bad)
                    array[:, list(bad)] = np.nan
                    row += len(images)
                    bar.update(len(images))
            array.flush()
            del array
        return np.load(path, mmap_mode="r")

    def _check_finite(self, values, first, model_file):
        finite = np.isfinite(values).all(axis=(0, 2))
        if not finite.all():
            name = self.faces.names[first + int(np.argmin(finite))].decode()
            raise EvalError(f"{model_file.file}: the embedding of {name} is not finite; use another checkpoint")

    def _refuse(self, reasons):
        """EvalError with the first unreadable images and their lines in the landmark file."""
        shown = [
            f"{self.protocol.image_dir / self.faces.names[row].decode()} ({why + ', ' if why else ''}"
            f"{self.protocol.landmark_file.name} line {row + 1})"
            for row, why in sorted(reasons.items())[:_NAMED]
        ]
        more = f" and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
        raise EvalError(
            f"unreadable image(s): {'; '.join(shown)}{more}; restore them, or skip all unreadable images with "
            "--skip-bad-images"
        )

    @functools.cached_property
    def data_key(self):
        """Digest of names, landmarks and image contents.

        Hashing every image takes minutes at full size, so the digest is cached with the sizes and times of the files
        and recomputed only if one of those changes.
        """
        signature = self._image_signature()
        where = hashlib.sha256(str(self.protocol.root).encode()).hexdigest()[:16]
        path = self.cache_dir / "meta" / f"{self.protocol.subset}_{where}_images.json"
        if path.exists() and not self.fresh:
            try:
                saved = json.loads(path.read_text())
                if saved["signature"] == signature:
                    return saved["content"]
            except (ValueError, KeyError, TypeError, OSError) as error:
                print(f"{path}: damaged cache ({error}); reading the images again", file=sys.stderr)
        content = self._image_digest()
        with publish(path) as partial:
            partial.write_text(json.dumps({"signature": signature, "content": content}))
        return content

    def _image_signature(self):
        """Digest of the names, landmarks, sizes and times of the images; EvalError if an image is missing."""
        folder, digest = self.protocol.image_dir, hashlib.sha256()
        if not folder.is_dir():
            raise EvalError(f"{folder}: no such directory; put the cropped images there")
        there = {}
        with os.scandir(folder) as entries:
            for entry in entries:
                status = entry.stat()
                there[entry.name] = f"{entry.name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n"
        for row, name in enumerate(self.faces.names.tolist()):
            line = there.get(name.decode())
            if line is None:
                raise EvalError(
                    f"{self.protocol.landmark_file} line {row + 1}: image {folder / name.decode()} does not exist; "
                    "unpack the images again, or remove the line from both lists"
                )
            digest.update(line.encode())
        digest.update(self.faces.landmarks.tobytes())
        return digest.hexdigest()

    def _image_digest(self):
        digest = hashlib.sha256(self.faces.landmarks.tobytes())
        paths = [self.protocol.image_dir / name.decode() for name in self.faces.names.tolist()]
        bar = tqdm(total=len(paths), desc="fingerprint of the images", unit="img", disable=None, file=sys.stderr)
        with bar, ThreadPoolExecutor(4) as pool:
            for start in range(0, len(paths), 1024):
                part = paths[start : start + 1024]
                for path, content in zip(part, pool.map(_hash_file, part)):
                    digest.update(f"{path.name} {content}\n".encode())
                bar.update(len(part))
        return digest.hexdigest()


def _hash_file(path):
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:  # reported with its line when the image is embedded
        return f"unreadable: {error.strerror}"
