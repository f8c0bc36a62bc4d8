"""An old side that is stored: features as an .npy file, and whose each row is, so that the old model need not run."""

import dataclasses
import functools
import pathlib

import numpy as np

from core.manifest import Manifest, manifest_path, read_manifest
from tools.ijbc_eval.files import EvalError
from tools.ijbc_eval.templates import LARGEST, l2_normalise


@dataclasses.dataclass(frozen=True)
class StoredFeatures:
    """`file`, an .npy: float [N, D], or int8 [N, D] with a scale; `labels`, a text file with a line a row, or an .npy.

    A label is the name of an image of the evaluation set or, where the set has no gallery folder, a person's. scale: a
    number, or an .npy of [1], [D] (one a dimension) or [N, 1] (one a row); a feature is scale · int8.
    Raises EvalError, when rows or labels are first needed, for files that cannot be such.
    """

    file: str
    labels: str | None
    scale: str | None = None

    @property
    def name(self):
        return pathlib.Path(self.file).stem

    @property
    def paths(self):
        if not self.labels:
            raise EvalError(f"{self.file}: stored features need --old_labels: whose each row is")
        files = [self.file, self.labels, *([self.scale] if self.scale and not _number(self.scale) else [])]
        return [pathlib.Path(file) for file in files]

    @functools.cached_property
    def identity(self):
        """Digest of the model that made them, as its manifest says; None without one."""
        return self.manifest.get("model")

    @functools.cached_property
    def manifest(self):
        return read_manifest(self.file) if manifest_path(self.file).is_file() else Manifest(self.file)

    @functools.cached_property
    def rows(self):
        """float32 [N, D], as stored, or times the scale."""
        array = _load(self.file)
        if array.ndim != 2 or not array.size or not (array.dtype == np.int8 or array.dtype.kind == "f"):
            found = f"{array.dtype} {list(array.shape)}"
            raise EvalError(f"{self.file}: {found}; stored features are float32, float16 or int8 [rows, width]")
        if (array.dtype == np.int8) != bool(self.scale):
            said = "int8 features need --old_scale" if not self.scale else f"--old_scale is for int8, not {array.dtype}"
            raise EvalError(f"{self.file}: {said}: a number, or an .npy with one a dimension, or [rows, 1]")
        rows = array.astype(np.float32)
        if self.scale:
            rows *= self._scale(array.shape)
        sound = (np.abs(rows) < LARGEST).all(axis=1) & rows.any(axis=1)
        if not sound.all():
            raise EvalError(f"{self.file}: row {np.argmin(sound)} is not finite, or only zeros; store it again")
        _ = self.manifest  # refuses a file that has changed since
        return rows

    def _scale(self, shape):
        scale = np.float32(self.scale) if _number(self.scale) else _load(self.scale)
        if scale.shape not in ((), (1,), shape[1:], (shape[0], 1)) or scale.dtype.kind != "f":
            found = f"{scale.dtype} {list(scale.shape)}"
            raise EvalError(f"--old_scale {self.scale}: {found}; for features {list(shape)} it must be one float, "
                            f"[{shape[1]}] or [{shape[0]}, 1]")  # fmt: skip
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise EvalError(f"--old_scale {self.scale}: must be finite and above 0")
        return scale.astype(np.float32)

    @functools.cached_property
    def kind(self):
        return str(_load(self.file).dtype)

    @functools.cached_property
    def names(self):
        """The label of each row, str [N]."""
        path = self.paths[1]
        if path.suffix == ".npy":
            names = _load(path).astype(str)
        else:
            try:
                names = np.array(path.read_text(encoding="utf-8-sig").splitlines(), str)
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", error)
                raise EvalError(f"--old_labels {path}: cannot be read ({why}); give a line for each row") from None
        if names.shape != (len(self.rows),):
            raise EvalError(
                f"--old_labels {path}: {len(names)} labels, but {self.file} has {len(self.rows)} rows; give one a row"
            )
        return names

    @functools.cached_property
    def people(self):
        """The features of rows labelled by person, float32 [N, D], L2-normalised."""
        return l2_normalise(self.rows)

    def of_images(self, images):
        """`(features float32 [images, D], there bool [images])` of an images.Images; zeros where there is no row."""
        row_of = {name: row for row, name in enumerate(self.names.tolist())}
        if len(row_of) < len(self.names):
            row = next(row for row, name in enumerate(self.names.tolist()) if row_of[name] != row)
            raise EvalError(f"--old_labels {self.labels}: {self.names[row]} is the label of two rows; keep one")
        place = np.array([row_of.get(images.name(row), -1) for row in range(len(images))])
        if place.max() < 0:
            raise EvalError(
                f"--old_labels {self.labels}: {self.names[0]} and the others are no images of the set, whose first is "
                f"{images.name(0)}; give names as the set has them"
            )
        features = np.where((place >= 0)[:, None], self.rows[place], np.float32(0))
        return features, place >= 0


def open_stored(file, labels, scale=None):
    """The StoredFeatures, read: mistakes in the files are an EvalError now, not after hours."""
    found = StoredFeatures(str(file), labels and str(labels), scale)
    _ = found.names
    return found


def cosines(features, exact):
    """Cosines of stored features to exact ones, of the rows that both have: (mean, lowest). float32 [T, D] both."""
    both = features.any(axis=1) & exact.any(axis=1)
    found = np.einsum("nd,nd->n", features[both], exact[both], dtype=np.float64)
    return float(found.mean()), float(found.min())


def said_of_loss(stored, features, exact):
    """A line about `cosines`; stored: the StoredFeatures."""
    mean, lowest = cosines(features, exact)
    return f"{stored.file}: {stored.kind}, cosine to float32: mean {mean:.6f}, lowest {lowest:.6f}"


def _number(text):
    try:
        return float(text) > 0
    except ValueError:
        return False


def _load(path):
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise EvalError(f"{path}: no such file; check the path") from None
    except Exception as error:  # whatever NumPy raises on damaged bytes
        raise EvalError(f"{path}: cannot be read as an .npy file ({str(error)[:100]}); write it again") from None
