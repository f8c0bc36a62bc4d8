"""UniBCT's refinement during training: all ranks embed the training set, each solves its share of the classes."""

import math
import pathlib
import time

import numpy as np
import torch

from BCT_methods.UniBCT.prototypes import refine_prototypes
from core import distributed
from core.config import require
from engine.extract import extract_features, shared_arrays
from engine.monitor import log
from engine.schedule import warn_of_unreached
from losses import OldPrototypes
from old_model.feature_set import FeatureError, RowFile, rewrite

SHORT = 2.0  # median norm of old features below which raw class means hardly pull
CLASSES_SAMPLED = 64  # evenly spread, for that median
ROWS_SAMPLED = 64  # of each of them, at most


def check_config(cfg):
    """Raise ConfigError for values that would fail only epochs later; warn of epochs that are never reached."""
    require(cfg, "damping", 0 <= cfg.damping < 1, "at least 0 and below 1")
    require(cfg, "temperature", cfg.temperature > 0, "above 0")
    require(cfg, "scale", cfg.scale > 0, "above 0")
    require(cfg, "compat_start_epoch", cfg.compat_start_epoch >= 0, "at least 0")
    # Before the first step BatchNorm's statistics are those of no data, and deep networks give infinity in float16.
    whole = all(isinstance(epoch, int) and epoch >= 1 for epoch in cfg.refine_epochs)
    require(cfg, "refine_epochs", whole, "a list of whole numbers, each at least 1")
    warn_of_unreached(cfg, "compat_start_epoch", [cfg.compat_start_epoch])
    warn_of_unreached(cfg, "refine_epochs", cfg.refine_epochs)


class Refinement(OldPrototypes):
    """Computes a run's prototypes, each rank those of its classes, and the softmax loss over them.

    old: the training set's OldFeatures; cfg: the run's config. The prototypes are zero until `refine` or
    `take_class_means` has run, on all ranks together; each also writes `<output>/prototypes_epoch_<e>.npy`, float32
    [num_classes, d_old]. Raises FeatureError for a class without images.
    """

    def __init__(self, old, cfg, device):
        super().__init__(cfg.num_classes, old.width, stored=True)
        self.old, self.cfg, self.device = old, cfg, device
        empty = np.flatnonzero(np.bincount(old.labels[:], minlength=cfg.num_classes) == 0)
        if len(empty):
            raise FeatureError(
                f"{old.path}: class {empty[0]} has no image ({len(empty)} of {cfg.num_classes} classes have none) and "
                "so no prototype; write the record file again with labels 0 … C − 1, without gaps"
            )
        if not cfg.normalize_prototypes and distributed.is_main():
            self._warn_of_short_features()

    def is_set(self):
        """Whether there are prototypes, on any rank: one may have only classes without old features."""
        return bool(distributed.all_reduce_(self.prototypes.any().int(), torch.distributed.ReduceOp.MAX))

    def refine(self, backbone, train_set, epoch):
        """Embed the training set with rank 0's backbone, and refine the class means by these features."""
        cfg, start = self.cfg, time.perf_counter()
        distributed.broadcast_buffers(backbone)  # as in model.pt
        path = pathlib.Path(cfg.output) / f"new_feature_epoch_{epoch}.npy"
        extract_features(
            backbone,
            train_set,
            path,
            embedding_size=cfg.embedding_size,
            batch_size=cfg.batch_size,
            num_workers=cfg.num_workers,
        )
        embedded = time.perf_counter()
        new = RowFile(path, 2, np.floating, remedy="resume the run with --resume True")
        self._set(new, cfg.damping, epoch)
        distributed.barrier()
        if distributed.is_main():
            path.unlink()
        log.info(
            "epoch %d: %d prototypes refined, in %.0f s after %.0f s for the new features",
            epoch,
            cfg.num_classes,
            time.perf_counter() - embedded,
            embedded - start,
        )

    def take_class_means(self, epoch):
        """The plain means of the old features, for epochs before the first refinement."""
        self._set(self.old.features, 0.0, epoch)  # without damping the new features do not matter
        log.info("epoch %d: the prototypes are plain class means until the first of refine_epochs", epoch)

    def _warn_of_short_features(self):
        """Log the effective scale if the old features are as short as unit vectors; reads a few thousand rows."""
        old, cfg = self.old, self.cfg
        classes = np.unique(np.linspace(0, cfg.num_classes - 1, CLASSES_SAMPLED).astype(np.int64))
        labels = old.labels[:]
        rows = np.flatnonzero(np.isin(labels, classes))
        parts = [rows[labels[rows] == label][:ROWS_SAMPLED] for label in classes]
        parts = [old.features[part].astype(np.float64) for part in parts]
        parts = [part[there] for part in parts if (there := part.any(axis=1)).any()]
        if not parts:
            return
        norm = np.median(np.linalg.norm(np.concatenate(parts), axis=1))
        if norm < SHORT:
            scale = cfg.scale * np.median([np.linalg.norm(part.mean(axis=0)) for part in parts])
            usual = math.sqrt(old.width)
            log.warning(
                "%s: the old features have norm %.2f (median), so the prototype term's effective scale, scale × norm "
                "of the class means, is %.2f; coordinates of unit variance give √%d: to match that set scale = %.1f",
                old.path,
                norm,
                scale,
                old.width,
                usual / norm,
            )

    def _set(self, new_features, damping, epoch):
        """Compute the prototypes of this rank's classes; the ranks write the file together."""
        cfg = self.cfg
        try:
            share = refine_prototypes(
                self.old.features,
                new_features,
                self.old.labels[:],
                damping,
                cfg.temperature,
                cfg.normalize_prototypes,
                classes=(self.classes.start, self.classes.stop),
                device=self.device,
            )
        except FeatureError:  # a ValueError, too
            raise
        except ValueError as error:
            raise FeatureError(f"{self.old.path}: {error}; {rewrite(self.old.path)}") from error
        self.prototypes = share.to(self.device, torch.float32)
        norms = torch.cat(distributed.gather_objects(self.prototypes.norm(dim=1).cpu()))
        if not norms.any():
            raise FeatureError(f"{self.old.path}: all its rows are zero; {rewrite(self.old.path)}")
        scales = cfg.scale * norms[norms > 0]
        log.info(
            "epoch %d: effective scale of the prototype term, scale × norm of a prototype: median %.2f (%.2f to %.2f)",
            epoch,
            scales.median(),
            scales.min(),
            scales.max(),
        )
        path = pathlib.Path(cfg.output) / f"prototypes_epoch_{epoch}.npy"
        with shared_arrays((path, (cfg.num_classes, self.old.width), np.float32)) as [array]:
            array.write(self.classes.start, self.prototypes.cpu().numpy())
