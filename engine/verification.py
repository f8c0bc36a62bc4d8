"""Verification on insightface's .bin sets (LFW, CFP-FP, AgeDB-30, ...) during training."""

import pathlib

import cv2
import numpy as np
import torch

from core import distributed
from dataset import decode_bgr
from engine.bin_files import VerificationError, read_bin
from losses.old_width import to_old_width

THRESHOLDS = np.arange(0, 4, 0.01)  # squared Euclidean distance of unit vectors, as is usual


def k_fold_accuracy(first, second, same, folds=10):
    """`accuracy_over_folds` of rows of unit norm, first and second: float [N, D]; same: bool [N]."""
    return accuracy_over_folds(np.square(first - second).sum(1), same, folds)


def accuracy_over_folds(distance, same, folds=10):
    """Mean accuracy over `folds` contiguous folds, each with the best threshold of the others.

    distance: float [N], squared, of unit vectors; same: bool [N]. A pair matches if its distance is below the
    threshold. Returns a float in [0, 1], or NaN if a distance is not finite: compared, its pair would count as
    different. Protocol: LFW (Huang et al., 2007), image-restricted.
    """
    if not np.isfinite(distance).all():
        return float("nan")
    correct = (distance[:, None] < THRESHOLDS) == same[:, None]  # [N, T]
    scores = []
    # Consecutive rows, as sklearn's KFold has them, whose import would take a third of a rank's start.
    for test in np.array_split(np.arange(len(same)), min(folds, len(same))):
        best = np.argmax(np.delete(correct, test, axis=0).mean(0))
        scores.append(correct[test, best].mean())
    return float(np.mean(scores))


class Verifier:
    """Evaluates a backbone on the .bin sets `names` in `directory`, all ranks together. Falsy without names.

    Every image is decoded once here: a set that cannot be verified is a VerificationError now, not after hours.
    old: the old model's backbone, for cross-tests, or None. `old_accuracies`: its own, {name: accuracy}.
    """

    def __init__(self, directory, names, batch_size, device, old=None):
        self.batch_size, self.device = batch_size, device
        self.paths = {name: pathlib.Path(directory) / f"{name}.bin" for name in names}
        self.sets = {name: read_bin(path) for name, path in self.paths.items()}
        for name, (images, same) in self.sets.items():
            if len(same) < 2:
                raise VerificationError(f"{self.paths[name]}: one pair; the accuracy over folds needs two or more")
            for position in self._share(images):
                self._decode(name, position, images[position])
        self.old = {name: self._embed(old, name, images) for name, (images, _) in self.sets.items()} if old else {}
        self.old_accuracies = {name: self._accuracy(name, rows, rows) for name, rows in self.old.items()}

    def __bool__(self):
        return bool(self.sets)

    def run(self, backbone):
        """`{test: {name: 10-fold accuracy}}` of embeddings f(x) + f(mirrored x), tests "self" and, with an old model,
        "cross", where that embeds the first image of each pair; leaves the backbone in training mode."""
        backbone.eval()
        accuracies = {"self": {}, **({"cross": {}} if self.old else {})}
        for name, (images, _) in self.sets.items():
            embeddings = self._embed(backbone, name, images)
            accuracies["self"][name] = self._accuracy(name, embeddings, embeddings)
            if self.old:
                old = self.old[name]
                accuracies["cross"][name] = self._accuracy(name, old, _of_width(embeddings, old.shape[1]))
        backbone.train()
        return accuracies

    def _accuracy(self, name, first, second):
        """Of the first images by the rows `first` and the second ones by `second`, both [2·N, D] of all images."""
        return k_fold_accuracy(first[0::2], second[1::2], self.sets[name][1])

    @torch.no_grad()
    def _embed(self, backbone, name, images):
        share, mine = self._share(images), []
        for low in range(0, len(share), self.batch_size):
            batch = [self._decode(name, position, images[position]) for position in share[low : low + self.batch_size]]
            pixels = torch.from_numpy(np.stack(batch)).to(self.device).permute(0, 3, 1, 2).float()
            pixels = (pixels / 255 - 0.5) / 0.5
            mine.append((backbone(pixels) + backbone(pixels.flip(3))).float())
        # The shares differ by a row, so all-gather does not fit: every rank adds its rows to a full table.
        width = torch.tensor(mine[0].shape[1] if mine else 0, device=self.device)
        width = int(distributed.all_reduce_(width, torch.distributed.ReduceOp.MAX))
        table = torch.zeros(len(images), width, device=self.device)
        if mine:
            table[share.start : share.stop] = torch.cat(mine)
        distributed.all_reduce_(table)
        return torch.nn.functional.normalize(table).cpu().numpy()

    def _share(self, images):
        """The positions of this rank's share, a range."""
        return range(*distributed.rows_of_rank(len(images), distributed.rank(), distributed.world_size()))

    def _decode(self, name, position, data):
        try:
            return cv2.cvtColor(decode_bgr(np.frombuffer(data, np.uint8)), cv2.COLOR_BGR2RGB)
        except ValueError as error:
            raise VerificationError(f"{self.paths[name]}: image {position}: {error}") from None


def _of_width(embeddings, width):
    """Rows of unit norm as they are compared with old ones of `width`; unchanged, to the digit, if that is theirs."""
    same = embeddings.shape[1] == width
    return embeddings if same else to_old_width(torch.from_numpy(embeddings), width).numpy()
