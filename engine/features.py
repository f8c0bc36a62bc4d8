"""Features on disk: written by all ranks together, read back by row number, held against their training set.

engine/feature_files.py says which files there are and what they are called.
"""

import errno
import os
import pathlib
import re

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from engine.atomic import atomic_write
from engine.distributed import barrier, is_main, rank, rows_of_rank, world_size
from engine.feature_files import FeatureError, again, again_from_images, check_not_older, command_for
from loader import ExtractLoader

LABELS_SAMPLED = 1024   # rows whose labels are held against the record file when features are opened


# --- Writing -----------------------------------------------------------------------------------------------------


class SharedArray:
    """One .npy file that all ranks fill together, each its own rows; it has its final name only once it is whole.

    All ranks construct it, write and `finish`; then one calls `publish`. Rank 0 reserves the whole size first, so that
    a full disk is known before the work. Rows go through the file, not through a mapping: a mapping dies of SIGBUS
    where the disk is full, and two machines on a network disk would overwrite each other's rows within a page.
    On several machines the directory must be shared. Raises FeatureError where it cannot be written.
    """

    def __init__(self, path, shape, dtype):
        self.path, self.dtype = pathlib.Path(path), np.dtype(dtype)
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")
        self.row_bytes = self.dtype.itemsize * int(np.prod(shape[1:]))
        if is_main():
            try:
                self._reserve(shape)
            except OSError as error:
                self._fail(error)
        barrier()
        self.file = open(self.temporary, "r+b")
        np.lib.format.read_magic(self.file)
        np.lib.format.read_array_header_1_0(self.file)
        self.offset = self.file.tell()

    def _reserve(self, shape):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": tuple(shape)}
        with open(self.temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            size = file.tell() + shape[0] * self.row_bytes
            file.truncate(size)
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except AttributeError:
                pass    # not a system that has it: a full disk shows when rows are written
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):     # a file system that cannot reserve
                    raise

    def write(self, row, values):
        """Store `values` [n, …] as the rows row … row + n."""
        try:
            self.file.seek(self.offset + row * self.row_bytes)
            self.file.write(np.ascontiguousarray(values, self.dtype))
        except OSError as error:
            self._fail(error)

    def finish(self):
        """Bring this rank's rows to the disk."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        except OSError as error:
            self._fail(error)

    def publish(self):
        """Give the file its final name; on one rank, after all have finished."""
        os.replace(self.temporary, self.path)

    def discard(self):
        """Leave nothing behind; a file of the final name stays as it was."""
        if is_main():
            self.temporary.unlink(missing_ok=True)

    def _fail(self, error):
        self.discard()
        raise FeatureError(f"{self.path}: could not be written ({error.strerror}); is the disk full?") from error


def extract_features(model, dataset, feature_path, label_path=None, *, embedding_size, batch_size=128, num_workers=2):
    """Embed every image of `dataset`, in record order and never flipped, into a .npy file; all ranks call it together.

    model: a module from images [B, 3, 112, 112] to embeddings [B, embedding_size], on its device; it runs in eval mode,
        outside autograd, and gets its modes back. A DDP wrapper is taken off: it would exchange buffers at every batch,
        and ranks may have different numbers of batches.
    dataset: a data set of dataset.py. Rank r of w embeds the r-th of w contiguous parts.
    feature_path: written whole as float32 [N, embedding_size]; label_path, if given: int64 [N].
    batch_size: images at once; num_workers: decoding processes of a rank.
    Raises FeatureError for embeddings of another width or that are not finite, and for a full disk. Files that were
    there before are untouched then.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    arrays = []
    modes = [(module, module.training) for module in model.modules()]
    try:
        arrays.append(SharedArray(feature_path, (len(dataset), embedding_size), np.float32))
        if label_path:
            arrays.append(SharedArray(label_path, (len(dataset),), np.int64))
        _embed_rows_of_rank(model.eval(), dataset, arrays, embedding_size, batch_size, num_workers)
        for array in arrays:
            array.finish()
    except BaseException:
        for array in arrays:
            array.discard()
        raise
    finally:
        for module, training in modes:
            module.training = training
    barrier()
    if is_main():
        for array in reversed(arrays):  # the features last: whoever sees them finds their labels
            array.publish()
    barrier()


@torch.no_grad()
def _embed_rows_of_rank(model, dataset, arrays, embedding_size, batch_size, num_workers):
    start, stop = rows_of_rank(len(dataset), rank(), world_size())
    device = next(model.parameters()).device
    loader = ExtractLoader(dataset, batch_size, device, num_workers, start, stop)
    row = start
    with tqdm(total=stop - start, unit="img", desc="features", disable=None if is_main() else True) as progress:
        for images, labels, index in loader:
            embeddings = model(images).float()
            if embeddings.shape != (len(images), embedding_size):
                raise FeatureError(
                    f"the model gives embeddings of shape {list(embeddings.shape[1:])}, "
                    f"but embedding_size is {embedding_size}"
                )
            embeddings = embeddings.cpu()
            finite = torch.isfinite(embeddings).all(dim=1)
            if not finite.all():
                raise FeatureError(
                    f"{dataset.path}: the model gives NaN or infinity for row {int(index[~finite][0])}; "
                    "the model or that image is broken"
                )
            for array, values in zip(arrays, (embeddings, labels.cpu())):
                array.write(row, values.numpy())
            row += len(images)
            progress.update(len(images))
    if row != stop:
        raise FeatureError(f"{dataset.path}: gave {row - start} images for the rows {start} to {stop}")


def save_array(path, array):
    """Write a .npy file under a temporary name and rename it once it is whole and on the disk."""
    try:
        with atomic_write(path) as file:
            np.save(file, array)
    except OSError as error:
        raise FeatureError(f"{path}: could not be written ({error.strerror})") from error


# --- Reading -----------------------------------------------------------------------------------------------------


def to_device(tensor, device):
    """A tensor on `device`; from the CPU to CUDA by pinned memory, so that the host does not wait for the device.

    A plain `.to(device)` would return only after all that is queued on the device before the copy.
    """
    if tensor.is_cuda or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def open_array(path, ndim, kind):
    """Memory-map a .npy file of `ndim` dimensions whose dtype is of `kind` (np.floating, np.integer, np.bool_).

    Raises FeatureError with the command that writes the file where it is missing, damaged or of another form.
    """
    try:
        array = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise FeatureError(f"{path}: no such file; write it by: {command_for(path)}") from None
    except (ValueError, EOFError, OSError) as error:
        raise FeatureError(f"{path}: not a readable .npy file ({error}); {again(path)}") from error
    if array.ndim != ndim or not np.issubdtype(array.dtype, kind):
        held = f"{array.dtype} {list(array.shape)}"
        raise FeatureError(f"{path}: holds {held}, not {ndim}-D {kind.__name__}; {again(path)}")
    return array


def open_feature_set(files):
    """`(features [N, D], labels [N])` of a FeatureSet, memory-mapped. Raises FeatureError, also for unequal lengths."""
    features, labels = open_array(files.feature, 2, np.floating), open_array(files.label, 1, np.integer)
    if len(features) != len(labels) or not len(features):
        raise FeatureError(
            f"{files.feature}: {len(features)} rows, but {files.label.name} has {len(labels)}; both must have as many "
            f"as there are images. Write them again: {files.command()}"
        )
    return features, labels


class OldFeatures:
    """The old model's features of the training set, memory-mapped: all ranks of a machine share one copy.

    feature_path: …_feature.npy, float [N, D]. label_path: by default the …_label.npy beside it.
    train_set: the training set, of which length and a spread sample of labels are compared here.
    embedding_size: the width that the new model needs; None = any.
    old_model_path: the model that the features must not be older than; "" or None = any age will do.
    Raises FeatureError, with the command to run, for files that are missing, stale or not of this training set.
    """

    def __init__(self, feature_path, train_set, label_path=None, embedding_size=None, old_model_path=None):
        if not feature_path:
            raise FeatureError("old_embedding is empty; set it in the config to a …_feature.npy of get_feature.py")
        self.path, self.record = pathlib.Path(feature_path), train_set.path
        label_path = pathlib.Path(label_path or re.sub(r"_feature\.npy$", "_label.npy", str(feature_path)))
        self.features = open_array(self.path, 2, np.floating)
        self.labels = open_array(label_path, 1, np.integer)
        self.pending = None
        for path, array in ((self.path, self.features), (label_path, self.labels)):
            if len(array) != len(train_set):
                self._wrong(f"{path}: {len(array)} rows, but {self.record} has {len(train_set)} images")
        if embedding_size is not None and self.features.shape[1] != embedding_size:
            raise FeatureError(
                f"{self.path}: features of width {self.features.shape[1]}, but embedding_size is {embedding_size}; "
                "set embedding_size to the old model's, or take the features of an old model of that width; "
                f"if that model has changed since, {again(self.path)}"
            )
        check_not_older(self.path, old_model_path)
        rows = np.unique(np.linspace(0, len(train_set) - 1, LABELS_SAMPLED).astype(np.int64)) if len(train_set) else []
        for row in rows:
            self._compare(row, self.labels[row], train_set.label(int(row)))

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        """Rows as they are stored: index int64 [B], on the CPU -> float32 [B, D] on the CPU."""
        rows = np.asarray(self.features[np.asarray(index)], dtype=np.float32)
        if not np.isfinite(rows).all():
            broken = np.asarray(index)[~np.isfinite(rows).all(axis=1)]
            raise FeatureError(f"{self.path}: NaN or infinity in row {broken[0]}; {again(self.path)}")
        return torch.from_numpy(rows)

    def fetch(self, index, device):
        """Rows of index int64 [B] (CPU) as float32 [B, D] on the device, without waiting for it: see `to_device`.

        Called before the backbone, the rows are read from the file and on their way while the device is still at work.
        """
        return to_device(self[index], device)

    def check_labels(self, index, labels):
        """Hold a batch's labels [B] (any device) against the stored ones of its rows `index` [B] (CPU).

        Raises FeatureError. On CUDA the labels come over while the step runs and are compared when the next batch
        comes, so that the host never waits for the device.
        """
        stored = torch.from_numpy(self.labels[np.asarray(index)].astype(np.int64))
        if not labels.is_cuda:
            return self._check(index, stored, labels)
        if self.pending is not None:
            event, *batch = self.pending
            event.synchronize()
            self._check(*batch)
        event, on_host = torch.cuda.Event(), labels.detach().to("cpu", non_blocking=True)
        event.record()
        self.pending = (event, index, stored, on_host)

    def _check(self, index, stored, labels):
        wrong = (stored != labels.view(-1)).nonzero().flatten()
        if len(wrong):
            self._compare(index[wrong[0]], stored[wrong[0]], labels.view(-1)[wrong[0]])

    def _compare(self, row, stored, label):
        if int(stored) != int(label):
            self._wrong(
                f"{self.path}: row {int(row)} is of class {int(stored)}, but in {self.record} of class {int(label)}"
            )

    def _wrong(self, what):
        raise FeatureError(
            f"{what}: the features were made from another record file. Run get_feature again: {command_for(self.path)}"
        )


def load_credible(path, train_set, old_model_path=None):
    """bool [N] on the CPU: which rows of the training set have a credible old feature (see denoise_credible.py).

    path: …_credible_ratio_90_feature.npy; "" = all rows are credible. old_model_path: as for OldFeatures.
    Raises FeatureError, with the command to run, for a missing file, one that is stale or of another length, or one
    without a credible row.
    """
    if not path:
        return torch.ones(len(train_set), dtype=torch.bool)
    credible = torch.from_numpy(np.array(open_array(path, 1, np.bool_)))
    if len(credible) != len(train_set):
        raise FeatureError(
            f"{path}: {len(credible)} rows, but {train_set.path} has {len(train_set)} images: "
            f"it was made from another record file; {again_from_images(path)}"
        )
    if not credible.any():
        raise FeatureError(f"{path}: no row is credible; {again(path)}")
    check_not_older(path, old_model_path)
    return credible
