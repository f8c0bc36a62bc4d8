"""Features on disk: written by all ranks together, read back by row number, held against their training set.

A feature set is known by its name, `<old model>_<set>`, say `f128_r18_softmax_class70`: the old model's config name
without its own set, and the set that was embedded. Row i of every file belongs to image i of that set's record file.

    feature_save/<scenario>/<name>_feature.npy                      float32 [N, D], as the model gave them
                            <name>_label.npy                        int64 [N]
                            <name>_avg_feature.npy                  float32 [C, D], L2-normalised class means
                            <name>_credible_ratio_90_feature.npy    bool [N]
"""

import errno
import os
import pathlib
import re

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dataset import ExtractLoader
from engine.config import REPO
from engine.distributed import barrier, is_main, rank, rows_of_rank, world_size
from engine.errors import UserError

# Last part of a name -> (scenario directory, record file). OP (open): the new model trains on data that the old one
# never saw; EX (extended): on everything.
SETS = {
    "class30": ("OPclass", "train_part_30_class.rec"),
    "class70": ("OPclass", "train_part_70_class.rec"),
    "class100": ("EXclass", "train.rec"),
    "data30": ("OPdata", "train_part_30_data.rec"),
    "data70": ("OPdata", "train_part_70_data.rec"),
    "data100": ("EXdata", "train.rec"),
}
LABELS_SAMPLED = 1024   # rows whose labels are held against the record file when features are opened


class FeatureError(UserError, ValueError):
    """A feature set's name or file that cannot be used; the message names it and the command to run."""


class FeatureSet:
    """The files of one feature set. `name`: `<old model>_<set>`; `root`: the feature_save directory.

    Attributes: name, old_model, set, scenario, record (file name), and the paths feature, label, avg_feature.
    Raises FeatureError for a name whose last part is none of SETS.
    """

    def __init__(self, name, root=None):
        self.root = pathlib.Path(root) if root else REPO / "feature_save"
        self.name = name
        self.old_model, _, self.set = name.rpartition("_")
        if not self.old_model or self.set not in SETS or pathlib.Path(name).name != name:
            raise FeatureError(
                f"--SD {name}: must be <old model>_<set> with one of the sets {', '.join(SETS)}, "
                "such as f128_r18_softmax_class70"
            )
        self.scenario, self.record = SETS[self.set]
        self.feature = self._path("feature")
        self.label = self._path("label")
        self.avg_feature = self._path("avg_feature")

    def credible(self, ratio):
        """Path of the credible rows at `ratio` in (0, 1]: 0.9 -> …_credible_ratio_90_feature.npy."""
        return self._path(f"credible_ratio_{100 * ratio:g}_feature")

    def _path(self, what):
        return self.root / self.scenario / f"{self.name}_{what}.npy"

    def command(self, script="get_feature", options=""):
        """The command line that writes this set's features (or, by another script, what is derived from them)."""
        config = f" {self._config()}" if script == "get_feature" else ""
        root = "" if self.root.resolve() == REPO / "feature_save" else f" --feature_save {self.root}"
        return f"python tools/get_feature/{script}.py{config}{options} --SD {self.name}{root}"

    def _config(self):
        kind = self.set.rstrip("0123456789")
        for suffix in (f"_{kind}30", f"_{kind}100", f"_{self.set}", ""):
            stem = self.old_model + suffix
            for path in sorted((REPO / "configs").rglob(f"{stem}.py")):
                return path.relative_to(REPO).as_posix()
        return "CONFIG"


def command_for(path):
    """The command that writes the file `path` of a feature_save directory, as far as its name tells."""
    path = pathlib.Path(path)
    match = re.fullmatch(r"(.+?)_(feature|label|avg_feature|credible_entropy_feature|credible_ratio_([0-9.]+)_feature)\.npy", path.name)
    try:
        files = FeatureSet(match[1], path.parent.parent)
    except (FeatureError, TypeError):
        return "python tools/get_feature/get_feature.py CONFIG --SD NAME"
    if match[2] == "avg_feature":
        return files.command("get_avg_feature")
    if match[2] == "credible_entropy_feature":
        return files.command("credible_entropy")
    if match[3]:
        return files.command("denoise_credible", f" --T {float(match[3]) / 100:g}")
    return files.command()


def again(path):
    return f"write it again: {command_for(path)}"


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
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FeatureError(f"{path}: could not be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


# --- Reading -----------------------------------------------------------------------------------------------------


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
    Raises FeatureError, with the command to run, for files that are missing or not of this training set.
    """

    def __init__(self, feature_path, train_set, label_path=None, embedding_size=None):
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
                "set embedding_size to the old model's, or take the features of an old model of that width"
            )
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


def load_credible(path, train_set):
    """bool [N] on the CPU: which rows of the training set have a credible old feature (see denoise_credible.py).

    path: …_credible_ratio_90_feature.npy; "" = all rows are credible.
    Raises FeatureError, with the command to run, for a missing file, another length, or a file without a credible row.
    """
    if not path:
        return torch.ones(len(train_set), dtype=torch.bool)
    credible = torch.from_numpy(np.array(open_array(path, 1, np.bool_)))
    if len(credible) != len(train_set):
        raise FeatureError(
            f"{path}: {len(credible)} rows, but {train_set.path} has {len(train_set)} images: "
            f"it was made from another record file. Run get_feature again, then: {command_for(path)}"
        )
    if not credible.any():
        raise FeatureError(f"{path}: no row is credible; write it again: {command_for(path)}")
    return credible
