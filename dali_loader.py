"""`TrainLoader` with NVIDIA DALI as its decoder (dali = True): on CUDA nvJPEG, so that the CPU only reads the records.

DALI's own MXNet reader is not used: it shuffles by itself, does not say which row an image is, and cannot begin in
mid-epoch. Here `TrainLoader`'s workers read the records, in its order, and DALI is fed with their bytes.
"""

import collections
import traceback

import numpy as np
import torch

from dataset import RecordDataset
from engine.errors import UserError
from image_bytes import IMAGE_SHAPE, image_size, whole_image
from loader import TrainLoader
from recordio import RecordError

_IN_DALI = 3  # batches: one is handed out, two are in the making
_STREAMS = {}  # one of each GPU for good: memory that was allocated on a stream is reused by that one alone
_PPM_HEADER = b"P6 %d %d 255\n" % IMAGE_SHAPE[1::-1]


class DaliError(UserError):
    """dali = True cannot be had here. The message says what to install or to set."""


class _Undecoded:
    """A `RecordDataset` for `TrainLoader`'s workers, which puts the encoded image where the decoded one has its place.

    An image is checked for being whole and of the right size, which DALI might not mind. One of more bytes than its
    pixels have is decoded here after all; its size is then given as 0.
    """

    def __init__(self, dataset):
        self.dataset, self.path = dataset, dataset.path

    def __len__(self):
        return len(self.dataset)

    def fill(self, rows, images):
        """As `RecordDataset.fill`, but returns `(labels int64 [B], sizes in bytes int64 [B])`."""
        sizes = [self._put(row, image) for row, image in zip(rows, images)]
        return np.array([self.dataset.label(row) for row in rows]), np.array(sizes)

    def _put(self, row, image):
        data = self.dataset.reader.read_image(int(self.dataset.keys[row]))[1]
        if len(data) > image.size or image_size(data) != IMAGE_SHAPE[1::-1] or whole_image(data) is None:
            self.dataset.fill([row], image[np.newaxis])  # raises for most of them, saying what is wrong
            return 0
        image.reshape(-1)[:len(data)] = data
        return len(data)


def _encoded(images, sizes):
    """What `_Undecoded` put into `images` [B, ...], as DALI takes it: uint8 [B, longest] and the bytes of each.

    One array costs the training process half as much time as B arrays would.
    """
    images = images.reshape(len(images), -1)
    if sizes.all():
        return images[:, :sizes.max()].copy(), sizes
    header = np.frombuffer(_PPM_HEADER, np.uint8)
    encoded = np.empty((len(images), len(header) + images.shape[1]), np.uint8)
    encoded[:, :images.shape[1]] = images
    for row in np.flatnonzero(sizes == 0):
        encoded[row] = np.concatenate([header, images[row]])
    return encoded, np.where(sizes == 0, encoded.shape[1], sizes)


class _Decoder:
    """A pipeline of DALI's.

    Args:
        steps: iterator of `(encoded, sizes, mirrored)`, see `_encoded`, with mirrored int32 [B]; `_IN_DALI` are drawn
            before the first is handed out.
        batch_size: images of each step.
        num_threads: of the CPU, that take part in decoding.
    """

    def __init__(self, steps, batch_size, num_threads, device):
        from nvidia.dali import Pipeline, fn, types

        self._device, gpu, how = device, None, {"device": "cpu"}
        if device.type == "cuda":
            gpu = torch.cuda.current_device() if device.index is None else device.index
            self._stream = _STREAMS.setdefault(gpu, torch.cuda.Stream(gpu))
            # Colour between its samples as OpenCV interpolates it; and threads that the system may place: tied to
            # cores, those of several ranks could all be tied to the same few.
            how = {"device": "mixed", "jpeg_fancy_upsampling": True, "affine": False}
        self._pipeline = Pipeline(batch_size, num_threads, gpu, prefetch_queue_depth=_IN_DALI)
        with self._pipeline:
            encoded, sizes, mirrored = fn.external_source(steps, num_outputs=3, batch=True)
            images = fn.decoders.image(fn.slice(encoded, 0, sizes, axes=[0]), output_type=types.RGB, **how)
            middle = [127.5] * 3  # (x/255 - 0.5)/0.5 = (x - 127.5)/127.5
            images = fn.crop_mirror_normalize(
                images, mirror=mirrored, mean=middle, std=middle, dtype=types.FLOAT, output_layout="CHW"
            )
            self._pipeline.set_outputs(images)
        self._pipeline.build()

    def run(self):
        """The images of the next step, float32 [B, 3, 112, 112] on the device; StopIteration after the last one."""
        try:
            images = self._pipeline.run()[0].as_tensor()
        except BaseException as error:
            # The pipeline has ended, and must not become garbage that the error's frames hold: a process forked later
            # might collect it, and would wait for threads that it does not have.
            self._pipeline = None
            traceback.clear_frames(error.__traceback__)
            raise
        if images.shape()[1:] != [3, *IMAGE_SHAPE[:2]]:
            raise ValueError(f"DALI decoded to the shape {images.shape()}")
        return self._copy(images)

    def _copy(self, images):
        """As a torch tensor of its own: DALI's memory may hold another batch as soon as `images` is gone."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        if self._device.type != "cuda":
            return feed_ndarray(images, torch.empty(images.shape()))
        with torch.cuda.stream(self._stream):  # where the copy has no other work to wait for
            copy = torch.empty(images.shape(), device=self._device)
            feed_ndarray(images, copy, cuda_stream=self._stream)
        self._stream.synchronize()
        copy.record_stream(torch.cuda.current_stream(self._device))
        return copy


def _require_dali():
    try:
        import nvidia.dali
        import nvidia.dali.plugin.pytorch  # noqa: F401
    except (ImportError, OSError) as error:
        package = f"nvidia-dali-cuda{(torch.version.cuda or '12').split('.')[0]}0"
        raise DaliError(
            f"dali = True, but NVIDIA DALI cannot be imported ({error}): pip install {package}, or set dali = False"
        ) from None


class DaliLoader(TrainLoader):
    """A rank's share of every global batch of an epoch, as `TrainLoader` gives it, but decoded by DALI.

    Rows, labels, order and mirroring are the same. So are, but for the rounding of floats, the images that DALI
    decodes on the CPU; nvJPEG rounds some pixels to another value.

    Args:
        dataset: a `RecordDataset`.
        num_workers: processes that read the records, 0 reads in this one; also DALI's threads, at least one.
        batch_size, device, seed, rank, world_size: see `TrainLoader`.

    Raises `DaliError` where DALI is not installed or the set is synthetic. Iterating raises `RecordError`, which names
    file, key and offset, for what `RecordDataset` refuses, and for an image that DALI alone does not decode.
    """

    def __init__(self, dataset, batch_size, device, num_workers=2, seed=0, rank=0, world_size=1):
        if not isinstance(dataset, RecordDataset):
            raise DaliError(
                f'dali = True decodes the images of a .rec, and rec = "{dataset.path}" is none; set dali = False'
            )
        _require_dali()
        super().__init__(_Undecoded(dataset), batch_size, device, num_workers, seed, rank, world_size)
        self.dataset, self._threads = dataset, max(num_workers, 1)

    def read_ahead(self, reader):
        """As `TrainLoader.read_ahead`."""
        self._plan.read_ahead(reader, len(self._shared.places) + _IN_DALI)

    def __iter__(self):
        in_dali, failed = collections.deque(), []
        # A pipeline for each iteration: what one that was left early has decoded ahead goes with it.
        decoder = _Decoder(self._fed(in_dali, failed), self._plan.batch_size, self._threads, self.device)
        while True:
            try:
                images = decoder.run()
            except StopIteration:
                break
            except Exception:
                self._name_broken(np.concatenate([rows for _, rows in in_dali]))
                raise
            labels, rows = in_dali.popleft()
            yield images, self._to_device(torch.from_numpy(labels)), torch.from_numpy(rows)
        if failed:
            raise failed.pop()

    def _fed(self, in_dali, failed):
        """The steps for `_Decoder`; notes `(labels, rows)` of each in `in_dali`.

        An error goes to `failed` and ends the steps, so that DALI still hands out those before it.
        """
        try:
            for place, (labels, sizes), rows, mirrored in self._decoded():
                encoded, sizes = _encoded(self._shared.places[place].numpy(), sizes)
                in_dali.append((labels, rows))
                yield encoded, sizes.astype(np.int32), mirrored.astype(np.int32)
        except Exception as error:
            failed.append(error)

    def _name_broken(self, rows):
        """Raise `RecordError` for the first of these rows that OpenCV or else DALI does not decode: DALI names none."""
        dataset, undecoded, image = self.dataset, _Undecoded(self.dataset), np.empty((1, *IMAGE_SHAPE), np.uint8)
        for row in rows:
            dataset.fill([row], image)
        alone = ((*_encoded(image, undecoded.fill([row], image)[1]), np.zeros(1, np.int32)) for row in rows)
        decoder = _Decoder(alone, 1, 1, self.device)
        for row in rows:
            try:
                decoder.run()
            except Exception as error:
                key = int(dataset.keys[row])
                raise RecordError(
                    f"{dataset.path}: key {key} at offset {dataset.reader.offset(key)}: OpenCV decodes this image, "
                    f"DALI does not; set dali = False"
                ) from error
