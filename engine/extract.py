"""Feature files written by all ranks, each its share of the rows. old_model/feature_set.py names the files."""

import os
import pathlib

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from core.agreement import failing_together
from core.distributed import barrier, gather_objects, is_main, rank, rows_of_rank, world_size
from core.files import open_temporary, publish, reserve
from core.manifest import write_manifest
from engine.loader import ExtractLoader
from old_model.feature_set import FeatureError, write_remedy


class SharedArray:
    """One .npy file that all ranks fill, each its own rows; it gets its final name once it is complete.

    All ranks construct it, write and `finish`; then one calls `publish`. Rank 0 reserves the whole size first, so that
    a full disk fails before the work, on all ranks. Rows are written to the file, not to a memory map, which dies of
    SIGBUS on a full disk and, on a network disk, lets two machines overwrite each other's rows within a page. With
    several machines the directory must be shared, under any path. Raises FeatureError if it cannot be written.
    """

    def __init__(self, path, shape, dtype):
        self.path, self.dtype = pathlib.Path(path), np.dtype(dtype)
        self.row_bytes = self.dtype.itemsize * int(np.prod(shape[1:]))
        self.temporary = self.file = None
        with failing_together():
            if is_main():
                try:
                    self._reserve(shape)
                except OSError as error:
                    self._fail(error)
        name = gather_objects(self.temporary and self.temporary.name)[0]
        if not is_main():
            self.temporary = self.path.with_name(name)
            self.file = open(self.temporary, "r+b")
        self.file.seek(0)
        np.lib.format.read_magic(self.file)
        np.lib.format.read_array_header_1_0(self.file)
        self.offset = self.file.tell()

    def _reserve(self, shape):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary, self.file = open_temporary(self.path)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(self.file, header)
        reserve(self.file, self.file.tell() + shape[0] * self.row_bytes)

    def write(self, row, values):
        """Store `values` [n, …] as rows row … row + n − 1."""
        try:
            self.file.seek(self.offset + row * self.row_bytes)
            self.file.write(np.ascontiguousarray(values, self.dtype))
        except OSError as error:
            self._fail(error)

    def finish(self):
        """Sync this rank's rows to disk."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            self._fail(error)

    def describe(self, what, **facts):
        """Write the manifest, before `publish`; on rank 0."""
        write_manifest(self.path, self.file, what, **facts)

    def publish(self):
        """Give the file its final name; on rank 0, after all have finished."""
        publish(self.file, self.temporary, self.path)

    def discard(self):
        """Close the file, and delete it on rank 0 if it has not got its final name."""
        if self.file is not None:
            self.file.close()
        if is_main() and self.temporary is not None:
            self.temporary.unlink(missing_ok=True)

    def _fail(self, error):
        self.discard()
        raise FeatureError(f"{self.path}: cannot be written ({error.strerror}); {write_remedy(error)}") from error


def extract_features(
    model,
    dataset,
    feature_path,
    label_path=None,
    *,
    embedding_size,
    batch_size=128,
    num_workers=2,
    made_from=None,
    device=None,
):
    """Embed all images of `dataset`, in record order and unflipped, into a .npy file; all ranks call it together.

    model: images [B, 3, 112, 112] -> embeddings [B, embedding_size], on its device. It runs in eval mode without
        autograd; its modes are restored. A DDP wrapper is removed: it would sync buffers at every batch, but ranks may
        have different numbers of batches.
    dataset: a data set of dataset.py. Rank r of w embeds the r-th of w contiguous parts.
    feature_path: written atomically as float32 [N, embedding_size]; label_path, if given: int64 [N].
    batch_size: images per forward pass; num_workers: decoding processes per rank.
    made_from: facts for the manifest of the features; None: no manifests. device: of the images; None = the model's.
    Raises FeatureError for embeddings that are non-finite or of another width, and for a full disk; existing files stay
    as they were.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    arrays = []
    modes = [(module, module.training) for module in model.modules()]
    try:
        arrays.append(SharedArray(feature_path, (len(dataset), embedding_size), np.float32))
        if label_path:
            arrays.append(SharedArray(label_path, (len(dataset),), np.int64))
        device = device or next(model.parameters()).device
        _embed_rows_of_rank(model.eval(), dataset, arrays, embedding_size, batch_size, num_workers, device)
        for array in arrays:
            array.finish()
        barrier()
        if is_main():
            if made_from is not None:
                facts = {"records": dataset.digest(), "rows": len(dataset)}
                arrays[0].describe("features", width=embedding_size, **facts, **made_from)
                for array in arrays[1:]:
                    array.describe("labels", **facts)
            for array in reversed(arrays):  # features last, so that their labels are there before them
                array.publish()
        barrier()
    finally:
        for array in arrays:
            array.discard()
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _embed_rows_of_rank(model, dataset, arrays, embedding_size, batch_size, num_workers, device):
    start, stop = rows_of_rank(len(dataset), rank(), world_size())
    loader = ExtractLoader(dataset, batch_size, device, num_workers, start, stop)
    row = start
    with tqdm(total=stop - start, unit="img", desc="features", disable=None if is_main() else True) as progress:
        for batch in loader:
            embeddings = model(batch.images).float()
            if embeddings.shape != (len(batch.images), embedding_size):
                raise FeatureError(
                    f"the model's embeddings have shape {list(embeddings.shape[1:])}, "
                    f"but embedding_size is {embedding_size}; correct it in the config"
                )
            embeddings = embeddings.cpu()
            finite = torch.isfinite(embeddings).all(dim=1)
            if not finite.all():
                raise FeatureError(
                    f"{dataset.path}: the model returns NaN or infinity for row {int(batch.index[~finite][0])}; "
                    "check the model's weights and that image"
                )
            for array, values in zip(arrays, (embeddings, batch.labels.cpu())):
                array.write(row, values.numpy())
            row += len(embeddings)
            progress.update(len(embeddings))
    if row != stop:
        raise FeatureError(f"{dataset.path}: {row - start} images for the rows {start} to {stop}")
