"""Verification on insightface's .bin sets (LFW, CFP-FP, AgeDB-30, ...) while training.

A .bin file is a pickle of `(images, same)`: 2·N encoded images and N booleans; images 2i and 2i+1 are pair i.
"""

import codecs
import pathlib
import pickle

import cv2
import numpy as np
import torch
from sklearn.model_selection import KFold

from engine import distributed
from engine.errors import UserError

THRESHOLDS = np.arange(0, 4, 0.01)  # of the squared Euclidean distance of unit vectors, as the field's tables use


class VerificationError(UserError):
    """A .bin set that is missing or damaged; the message names the file."""


class _BinUnpickler(pickle.Unpickler):
    """Admits lists, tuples, bytes and booleans, which need no class; a file that asks for any other is refused."""

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in the pickle protocols 0 to 2
            return _latin1_bytes
        raise pickle.UnpicklingError(f"asks for {module}.{name}, which a verification set has no use for")


def _latin1_bytes(text, encoding):
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return codecs.latin_1_encode(text)[0]


def read_bin(path):
    """Read a .bin set without running any code in it.

    Returns `(images, same)`: a list of 2·N encoded images (bytes) and a bool array [N]. Raises VerificationError.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            images, same = _BinUnpickler(file, encoding="bytes").load()
        same = np.array([{True: True, False: False}[value] for value in same], dtype=bool)
    except FileNotFoundError:
        raise VerificationError(
            f"{path}: no such verification set; put it there, or take it out of val_targets"
        ) from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise VerificationError(f"{path}: not a verification set ({type(error).__name__}: {error})") from error
    if not isinstance(images, list) or len(images) != 2 * len(same) or len(same) == 0:
        raise VerificationError(f"{path}: must hold a list of 2·N images and N booleans, N > 0")
    for position, image in enumerate(images):
        if not isinstance(image, bytes):
            raise VerificationError(f"{path}: image {position} is a {type(image).__name__}, not bytes")
    return images, same


def k_fold_accuracy(first, second, same, folds=10):
    """Mean accuracy over `folds` folds, each with the threshold that is best on the others.

    first, second: float [N, D], rows of unit norm; same: bool [N]. Pairs are equal where the squared distance is
    below the threshold. Returns a float in [0, 1]. Protocol: LFW (Huang et al., 2007), image-restricted.
    """
    distance = np.square(first - second).sum(1)
    correct = (distance[:, None] < THRESHOLDS) == same[:, None]  # [N, T]
    scores = []
    for train, test in KFold(n_splits=min(folds, len(same))).split(same):
        best = np.argmax(correct[train].mean(0))
        scores.append(correct[test, best].mean())
    return float(np.mean(scores))


class Verifier:
    """Runs a backbone over the .bin sets `names` under `directory`, all ranks together. Falsy without names."""

    def __init__(self, directory, names, batch_size, device):
        self.batch_size, self.device = batch_size, device
        self.paths = {name: pathlib.Path(directory) / f"{name}.bin" for name in names}
        self.sets = {name: read_bin(path) for name, path in self.paths.items()}

    def __bool__(self):
        return bool(self.sets)

    @torch.no_grad()
    def run(self, backbone):
        """`{name: 10-fold accuracy}` of embeddings f(x) + f(mirrored x); the backbone is left in training mode."""
        backbone.eval()
        accuracies = {}
        for name, (images, same) in self.sets.items():
            embeddings = self._embed(backbone, name, images)
            accuracies[name] = k_fold_accuracy(embeddings[0::2], embeddings[1::2], same)
        backbone.train()
        return accuracies

    def _embed(self, backbone, name, images):
        start, stop = distributed.rows_of_rank(len(images), distributed.rank(), distributed.world_size())
        mine = []
        for low in range(start, stop, self.batch_size):
            batch = [
                self._decode(name, position, images[position])
                for position in range(low, min(low + self.batch_size, stop))
            ]
            pixels = torch.from_numpy(np.stack(batch)).to(self.device).permute(0, 3, 1, 2).float()
            pixels = (pixels / 255 - 0.5) / 0.5
            mine.append((backbone(pixels) + backbone(pixels.flip(3))).float())
        # Ranks hold shares that differ by a row, so everyone adds its rows into a whole table.
        width = torch.tensor(mine[0].shape[1] if mine else 0, device=self.device)
        width = int(distributed.all_reduce_(width, torch.distributed.ReduceOp.MAX))
        table = torch.zeros(len(images), width, device=self.device)
        if mine:
            table[start:stop] = torch.cat(mine)
        distributed.all_reduce_(table)
        return torch.nn.functional.normalize(table).cpu().numpy()

    def _decode(self, name, position, data):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise VerificationError(f"{self.paths[name]}: image {position} does not decode")
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
