"""Feature files written by all ranks, each its share of the rows. old_model/feature_set.py names the files."""

import contextlib
import os
import pathlib

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from core.agreement import failing_together
from core.distributed import barrier, gather_objects, is_main, rank, rows_of_rank, world_size
from core.files import appears, open_temporary, publish, reserve
from core.manifest import write_manifest
from engine.loader import ExtractLoader
from old_model.feature_set import FeatureError, write_remedy


class SharedArray:
    """One .npy file that all ranks fill, each its own rows; `shared_arrays` makes it.

    Rank 0 reserves the whole size first, so that a full disk fails before the work, on all ranks. Rows are written to
    the file, not to a memory map, which dies of SIGBUS on a full disk and, on a network disk, lets two machines
    overwrite each other's rows within a page. With several machines the directory must be shared, under any path.
    Raises FeatureError if it cannot be written.
    """

    def __init__(self, path, shape, dtype):
        self.path, self.shape, self.dtype = pathlib.Path(path), tuple(shape), np.dtype(dtype)
        self.row_bytes = self.dtype.itemsize * int(np.prod(shape[1:]))
        self.temporary = self.file = self.manifest = None

    def open(self):
        """Make the file on rank 0 and open it on the others; all ranks call it together."""
        with failing_together(), self._writing():
            if is_main():
                self._reserve()
        name = gather_objects(self.temporary and self.temporary.name)[0]
        with failing_together(), self._writing():
            if not is_main():
                self.temporary = self.path.with_name(name)
                appears(self.temporary)  # late, on a network disk
                self.file = open(self.temporary, "r+b")
        self.file.seek(0)
        np.lib.format.read_magic(self.file)
        np.lib.format.read_array_header_1_0(self.file)
        self.offset = self.file.tell()

    def _reserve(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary, self.file = open_temporary(self.path)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self.file, header)
        reserve(self.file, self.file.tell() + self.shape[0] * self.row_bytes)

    def write(self, row, values):
        """Store `values` [n, …] as rows row … row + n − 1."""
        with self._writing():
            self.file.seek(self.offset + row * self.row_bytes)
            self.file.write(np.ascontiguousarray(values, self.dtype))

    def describe(self, what, **facts):
        """What its manifest will say; without it there is none."""
        self.manifest = {"what": what, **facts}

    def finish(self):
        """Sync this rank's rows to disk."""
        with self._writing():
            self.file.flush()
            os.fsync(self.file.fileno())

    def discard(self):
        """Close the file, and delete it on rank 0 if it has not got its final name."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # that of the block is raised
                self.file.close()
        if is_main() and self.temporary is not None:
            self.temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise FeatureError(f"{self.path}: cannot be written ({error.strerror}); {write_remedy(error)}") from error


@contextlib.contextmanager
def shared_arrays(*wanted):
    """`with shared_arrays((path, shape, dtype), …) as arrays:` SharedArrays to write; all ranks enter it together.

    Once all ranks have left the block the files get their names, the first one last; if it fails, none does.
    """
    arrays = [SharedArray(*one) for one in wanted]
    try:
        for array in arrays:
            array.open()
        yield arrays
        for array in arrays:
            array.finish()
        barrier()
        if is_main():
            for array in arrays:
                if array.manifest:
                    write_manifest(array.path, array.file, **array.manifest)
            for array in reversed(arrays):
                publish(array.file, array.temporary, array.path)
        barrier()
    finally:
        for array in arrays:
            array.discard()


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
    wanted = [(feature_path, (len(dataset), embedding_size), np.float32)]
    if label_path:
        wanted.append((label_path, (len(dataset),), np.int64))
    modes = [(module, module.training) for module in model.modules()]
    try:
        with shared_arrays(*wanted) as arrays:
            device = device or next(model.parameters()).device
            _embed_rows_of_rank(model.eval(), dataset, arrays, embedding_size, batch_size, num_workers, device)
            if made_from is not None:
                facts = {"records": dataset.digest(), "rows": len(dataset)}
                arrays[0].describe("features", width=embedding_size, **facts, **made_from)
                for array in arrays[1:]:
                    array.describe("labels", **facts)
    finally:
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
