"""The files of a feature set: names, the commands that write them, opening and saving.

A feature set is named `<old model>_<set>`, such as `f128_r18_softmax_class70`: the old model's config name without its
own set, and the set that was embedded. For a record file of one's own it has any other name, and the scenario `own`.
Row i of every file belongs to image i of that record file; a row of zeros is an image without an old feature.

    feature_save/<scenario>/<name>_feature.npy                      float32 [N, D], the model's output
                            <name>_label.npy                        int64 [N]
                            <name>_avg_feature.npy                  float32 [C, D], L2-normalised class means
                            <name>_credible_ratio_90_feature.npy    bool [N], by the distance to the class mean
                            <name>_credible_entropy_feature.npy     bool [N], by the entropy over the classes
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import shlex
import weakref

import numpy as np

from core.config import REPO
from core.errors import UserError
from core.files import atomic_write
from core.manifest import digest, manifest_path, read_manifest, write_manifest
from core.rows import read_rows

# Last part of a name -> (scenario directory, record file). OP (open): the new model trains on data unseen by the old
# one; EX (extended): on everything.
SETS = {
    "class30": ("OPclass", "train_part_30_class.rec"),
    "class70": ("OPclass", "train_part_70_class.rec"),
    "class100": ("EXclass", "train.rec"),
    "data30": ("OPdata", "train_part_30_data.rec"),
    "data70": ("OPdata", "train_part_70_data.rec"),
    "data100": ("EXdata", "train.rec"),
}


OWN = "own"  # scenario directory of names without a set
UNKNOWN = "(CONFIG | --model FILE | --features F.npy --paths P.txt)"  # what features are made from, in a command


class FeatureError(UserError, ValueError):
    """An unusable feature set name or file; the message names it and the command to run."""


class FeatureSet:
    """The files of one feature set. `name`: `<old model>_<set>`, or any other; `root`: the feature_save directory.

    Attributes: name, old_model, set and record (file name), both None for any other name, scenario, and the paths
    feature, label, avg_feature. Raises FeatureError for a name that is no file name.
    """

    def __init__(self, name, root=None):
        self.root = pathlib.Path(root) if root else REPO / "feature_save"
        self.name = name
        if not name or pathlib.Path(name).name != name:
            raise FeatureError(f"--SD {name}: must be a name, such as f128_r18_softmax_class70, not a path")
        self.old_model, _, self.set = name.rpartition("_")
        if not self.old_model or self.set not in SETS:
            self.old_model, self.set = name, None
        self.scenario, self.record = SETS.get(self.set, (OWN, None))
        self.feature = self._path("feature")
        self.label = self._path("label")
        self.avg_feature = self._path("avg_feature")

    def credible(self, ratio):
        """Path of the credible rows at `ratio` in (0, 1]: 0.9 -> …_credible_ratio_90_feature.npy."""
        return self._path(f"credible_ratio_{100 * ratio:g}_feature")

    def _path(self, what):
        return self.root / self.scenario / f"{self.name}_{what}.npy"

    def command(self, script="get_feature", options=""):
        """The command that writes this set's features (or, with another script, files derived from them)."""
        if script == "get_feature" and not self.names_a_config() and (made_by := _command_of(self.feature)):
            return f"python tools/get_feature/{made_by}"
        config = f" {self._config()}" if script == "get_feature" else ""
        record = " --rec REC" if script == "get_feature" and self.set is None else ""
        return f"python tools/get_feature/{script}.py{config}{options} --SD {self.name}{record}{self._place(script)}"

    def _place(self, script):
        """Options for a feature_save elsewhere; get_feature also needs the old model and the images there."""
        root = pathlib.Path(os.path.abspath(self.root))  # not resolved: the directory may be a link to a larger disk
        if root == REPO / "feature_save":
            return ""
        if script == "get_feature" and root.name == "feature_save":
            return f" --workspace {shlex.quote(str(root.parent))}"
        return f" --feature_save {shlex.quote(str(root))}"

    def names_a_config(self):
        """Whether the old model's name is that of a config."""
        return self._config() != UNKNOWN

    def _config(self):
        if self.set is None:
            return UNKNOWN
        kind = self.set.rstrip("0123456789")
        for suffix in (f"_{kind}30", f"_{kind}100", f"_{self.set}", ""):
            stem = self.old_model + suffix
            for path in sorted((REPO / "configs").rglob(f"{stem}.py")):
                return path.relative_to(REPO).as_posix()
        return UNKNOWN


def _command_of(path):
    """The get_feature command in the manifest of `path`, without what a launcher adds; None if it has none."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        command = json.loads(manifest_path(path).read_bytes())["command"]
        if command.startswith("get_feature.py "):
            return re.sub(r" --local[-_]rank[= ]\d+", "", command)
    return None


def _parse(path):
    """`(FeatureSet, what)` of a file in a feature_save directory; None for any other name."""
    path = pathlib.Path(path)
    kinds = "feature|label|avg_feature|credible_entropy_feature|credible_ratio_[0-9.]+_feature"
    match = re.fullmatch(rf"(.+?)_({kinds})\.npy", path.name)
    try:
        files = FeatureSet(match[1], path.parent.parent)
    except (FeatureError, TypeError):
        return None
    return (files, match[2]) if files.set or path.parent.name == OWN else None


def command_for(path):
    """The command that writes `path`, a file in a feature_save directory, as far as its name tells."""
    parsed = _parse(path)
    if parsed is None:
        return f"python tools/get_feature/get_feature.py {UNKNOWN} --SD NAME"
    files, what = parsed
    if what == "avg_feature":
        return files.command("get_avg_feature")
    if what == "credible_entropy_feature":
        return files.command("credible_entropy")
    if what.startswith("credible_ratio"):
        return files.command("denoise_credible", f" --T {float(what.split('_')[2]) / 100:g}")
    return files.command()


def rewrite(path):
    return f"rewrite it: {command_for(path)}"


def rewrite_from_images(path):
    """As `rewrite`, but a file derived from features needs those first."""
    parsed, own = _parse(path), command_for(path)
    first = parsed[0].command() if parsed else own
    return f"rewrite it: {own if first == own else f'{first} && {own}'}"


def right_file(path, record):
    """The next step for `path`, made from another record file than `record`, of which its name may say it is not."""
    parsed, name = _parse(path), pathlib.Path(record).name
    if parsed is None or parsed[0].record in (None, name):
        return rewrite_from_images(path)
    files, what = parsed
    kind = files.set.rstrip("0123456789")
    fitting = sorted((one for one in SETS if SETS[one][1] == name), key=lambda one: not one.startswith(kind))
    if fitting:
        other = f"take {FeatureSet(f'{files.old_model}_{fitting[0]}', files.root)._path(what)}"
    else:
        other = f"write features of {name}: {FeatureSet(files.old_model, files.root).command()}"
    return f"by its name it is of {files.record}: set rec to that, or {other}"


def label_path(feature_path):
    """`..._feature.npy` -> `..._label.npy` beside it."""
    return re.sub(r"_feature\.npy$", "_label.npy", str(feature_path))


# --- Opening and saving -----------------------------------------------------------------------------------------


def open_array(path, ndim, kind, remedy=None):
    """Memory-map a .npy file with `ndim` dimensions and a dtype of `kind` (np.floating, np.integer, np.bool_).

    Raises FeatureError with `remedy`, the next step, by default the command that writes it, if it is missing, damaged
    or of another shape or type.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise FeatureError(f"{path}: no such file; {remedy or f'write it: {command_for(path)}'}") from None
    except Exception as error:  # a damaged header can raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            raise FeatureError(f"{path}: cannot be read ({error.strerror}); check the path and the disk") from error
        reason = str(error).partition("\n")[0][:100]
        raise FeatureError(f"{path}: not a readable .npy file ({reason}); {remedy or rewrite(path)}") from error
    if array.ndim != ndim or not np.issubdtype(array.dtype, kind):
        found = f"{array.dtype} {list(array.shape)}"
        raise FeatureError(f"{path}: {found}, expected {ndim}-D {kind.__name__}; {remedy or rewrite(path)}")
    return array


class RowFile:
    """Reads rows of a .npy file (`ndim`, `kind`: see `open_array`) by system calls; `array` is its memory map.

    `file[rows]`, rows int64 [B] or a slice, is an array of them. A file cut meanwhile is an error (core/rows.py).
    Unpickled (in a spawned worker) it reopens the file.
    Raises FeatureError with `remedy`, the next step; default: the command that writes the file.
    """

    def __init__(self, path, ndim, kind, remedy=None):
        self.path, self.expected, self.array = path, (ndim, kind, remedy), open_array(path, ndim, kind, remedy)
        self.dtype, self.shape, self.remedy = self.array.dtype, self.array.shape, remedy or rewrite(path)
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)

    def __reduce__(self):
        return RowFile, (self.path, *self.expected)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        return self.read(np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows)

    def read(self, rows, out=None):
        """The rows int64 [B], in the file's dtype, or in `out` [B, …] and its dtype."""
        outside = (rows < 0) | (rows >= len(self))
        if outside.any():
            raise IndexError(f"{self.path}: row {rows[outside][0]} is out of range, the file has {len(self)} rows")
        if not self.array.flags.c_contiguous:  # Fortran order, as np.save writes a transposed array
            stored = self.array[rows]
        else:
            direct = out is not None and out.dtype == self.dtype
            stored = out if direct else np.empty((len(rows), *self.shape[1:]), self.dtype)
            read_rows(self.file, self.array.offset, rows, stored, self._fail)
        if out is None:
            return stored
        if stored is not out:
            out[...] = stored
        return out

    def _fail(self, row, why):
        if why is None:
            raise FeatureError(f"{self.path}: truncated before the end of row {row}; {self.remedy}")
        raise FeatureError(
            f"{self.path}: row {row} cannot be read ({why}); check the disk. If the file is lost, {self.remedy}"
        )


def open_feature_set(files):
    """`(features, labels, made_from)` of a FeatureSet: a RowFile [N, D], an array int [N].

    made_from: the facts for the manifest of a file made from them. Raises FeatureError if the lengths differ,
    ManifestError if the two are not of one record set.
    """
    features, labels = RowFile(files.feature, 2, np.floating), RowFile(files.label, 1, np.integer)
    if len(features) != len(labels) or not len(features):
        raise FeatureError(
            f"{files.feature}: {len(features)} rows, but {files.label.name} has {len(labels)}; both need one per "
            f"image. Rewrite them: {files.command()}"
        )
    manifest, of_labels = (read_manifest(path, rewrite(path)) for path in (files.feature, files.label))
    of_labels.require("records", manifest.get("records"), files.feature, f"rewrite both: {files.command()}")
    facts = {key: manifest.get(key) for key in ("records", "model")}
    return features, labels[:], {"features": digest(files.feature), **facts}


def save_array(path, array, what=None, **facts):
    """Write a .npy file atomically; `what` it is and the facts go into its manifest, None = it has none."""
    try:
        with atomic_write(path) as file:
            np.save(file, array)
            if what:
                write_manifest(path, file, what, **facts)
    except OSError as error:
        raise FeatureError(f"{path}: cannot be written ({error.strerror}); {write_remedy(error)}") from error


def write_remedy(error):
    """The next step after an OSError while writing features."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space on that disk, or write elsewhere with --feature_save"
    return "write elsewhere with --feature_save, or check the path, its permissions and the disk"
