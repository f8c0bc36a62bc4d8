"""Maps that are learned afterwards: new features into the old model's space, and the way between the two on the sphere.

A map makes the queries of any new model, one trained without the old model too, comparable with a gallery of old
features. fit_adapter.py fits one and describes the kinds.
"""

import dataclasses
import json
import pathlib
import zipfile

import numpy as np

from core.errors import UserError
from core.files import atomic_write

STATED = {"kind", "new", "new_model", "new_width", "old", "old_model", "old_width"}
STATED |= {"rows", "held_out_cosine", "strength"}  # of the fit
SMALL_SINE = 1e-6  # below it the weights of `slerp` are taken at their limit, off by the square of it


class AdapterError(UserError, ValueError):
    """An unusable map, or features that it does not fit; the message names the file and the next step."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A linear map of new features into the old model's space.

    matrix: float [new_width, old_width]. statement: what it maps, a value for each of STATED: kind ("procrustes" or
    "ridge"); of both sides the feature file, the digest of its model (None: not known) and the width; rows it was
    fitted on, mean cosine of a mapped feature to its old one of the people held out of a first fit, strength of the
    ridge regression (None for procrustes). path: its file, for messages.
    """

    matrix: np.ndarray
    statement: dict
    path: pathlib.Path

    def require(self, new, old):
        """Raise AdapterError if `new` and `old` are not the models whose features it was fitted to.

        Each has `identity`, the digest of the model or None if that is not known, and `file`, for the message.
        """
        for side, model in (("new", new), ("old", old)):
            known = self.statement[f"{side}_model"], model.identity
            if None not in known and known[0] != known[1]:
                raise AdapterError(
                    f"{self.path}: fitted to {self.statement[side]}, which is not of {model.file}; fit a map to this "
                    "model's features with tools/adapters/fit_adapter.py"
                )

    def apply(self, features):
        """Rows [N, new_width], any scale -> float32 [N, old_width]: L2-normalised, mapped, L2-normalised again.

        Rows of zeros stay zero. Raises AdapterError for another width.
        """
        if features.ndim != 2 or features.shape[1] != len(self.matrix):
            raise AdapterError(
                f"{self.path}: maps features of width {len(self.matrix)}, not {list(features.shape)}; "
                "fit a map to this model's features with fit_adapter.py"
            )
        # A row's length does not change the direction of its image.
        return unit(features.astype(np.float32) @ self.matrix.astype(np.float32))

    def __str__(self):
        said = self.statement
        strength = "" if said["strength"] is None else f" of strength {said['strength']:g}"
        return (
            f"{said['kind']}{strength}, width {said['new_width']} to {said['old_width']}, fitted on {said['rows']} "
            f"rows; mean cosine to old features held out of a first fit: {said['held_out_cosine']:.4f}"
        )

    def save(self):
        """Write `path`, an .npz that `load_adapter` reads. Raises AdapterError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                np.savez(file, matrix=self.matrix.astype(np.float32), statement=json.dumps(self.statement))
        except OSError as error:
            raise AdapterError(f"{self.path}: cannot be written ({error.strerror}); choose another --out") from error


def load_adapter(path):
    """The Adapter of a file of fit_adapter.py. Raises AdapterError for any other."""
    path = pathlib.Path(path)
    try:
        with np.load(path) as file:
            matrix, statement = file["matrix"], json.loads(str(file["statement"]))
        shape = (statement["new_width"], statement["old_width"])
        if set(statement) != STATED or matrix.shape != shape or not np.isfinite(matrix).all():
            raise ValueError(f"matrix {list(matrix.shape)}, stated as {list(shape)}, with finite numbers only")
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file; write it with tools/adapters/fit_adapter.py") from None
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise AdapterError(f"{path}: not a map of fit_adapter.py ({error}); write it again") from error
    return Adapter(matrix, statement, path)


def slerp(mapped, old, alpha=0.5):
    """The point at the fraction alpha of the arc from a mapped new feature g to the old feature v, on the unit sphere:

        q = [sin((1 − α)θ) g + sin(αθ) v] / sin θ,    cos θ = g·v

    mapped, old: [N, D], any scale, L2-normalised here to g and v. alpha: in [0, 1]; 0 = g, 1 = v. Returns [N, D] of
    unit length in the inputs' dtype. Where sin θ vanishes the weights are their limits at θ = 0, 1 − α and α; exactly
    opposite rows, which have no shortest arc, then give the nearer end, or zeros at alpha = 0.5.
    Raises ValueError for mismatched shapes or an alpha out of range.
    """
    if mapped.shape != old.shape or mapped.ndim != 2:
        raise ValueError(f"mapped {list(mapped.shape)} and old features {list(old.shape)} must both be [N, D]")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha = {alpha} must be in [0, 1]")
    g, v = unit(mapped.astype(np.float64)), unit(old.astype(np.float64))
    # Exact for nearly equal and nearly opposite rows, where arccos(g·v) loses half of the digits.
    theta = 2 * np.arctan2(np.linalg.norm(g - v, axis=1), np.linalg.norm(g + v, axis=1))[:, None]
    sine = np.sin(theta)
    vanishes = sine < SMALL_SINE
    sine = np.where(vanishes, 1, sine)
    of_g = np.where(vanishes, 1 - alpha, np.sin((1 - alpha) * theta) / sine)
    of_v = np.where(vanishes, alpha, np.sin(alpha * theta) / sine)
    return unit(of_g * g + of_v * v).astype(np.result_type(mapped, old))


def unit(rows):
    """Rows [N, D] divided by their L2 norms; rows of zeros stay zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)
