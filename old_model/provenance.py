"""Whether a run's files of the old model belong to its training set, to each other and to one old model."""

import logging
import pathlib

from core.config import PATH_KEYS
from core.manifest import digest, read_manifest
from old_model.feature_set import label_path, rewrite_from_images, right_file

# Not made from the old model, or, center_radius, made anew by the run that finds it outdated.
_OTHER_PATHS = ("rec", "rec_val", "output", "init_backbone", "old_model_path", "center_radius")


def made_from(cfg, train_set):
    """What a run's results depend on: `{"records": …, "old_model": …, key: …}`, digests.

    A key is one of cfg's paths to files of the old model. "old_model" is there where a manifest or `old_model_path`
    tells it. Missing files are left to those who open them.
    Raises ManifestError, with the command to run, for files that have changed since they were made, or were made from
    another record set, another model or other features.
    """
    found = {"records": train_set.digest()}
    if cfg.get("init_backbone") and pathlib.Path(cfg.init_backbone).is_file():
        found["init_backbone"] = digest(cfg.init_backbone)
    manifests = {key: read_manifest(path, rewrite_from_images(path)) for key, path in _files(cfg).items()}
    for manifest in manifests.values():
        manifest.require("records", found["records"], train_set.path, right_file(manifest.path, train_set.path))
    source = None
    if cfg.get("old_model_path") and pathlib.Path(cfg.old_model_path).is_file():
        found["old_model"], source = digest(cfg.old_model_path), f"old_model_path = {cfg.old_model_path}"
    elif cfg.get("old_model_path") and manifests:
        logging.getLogger("bct").info("old_model_path %s: no such file, so it is not compared", cfg.old_model_path)
    for key, manifest in manifests.items():
        manifest.require("model", found.get("old_model"), source, rewrite_from_images(manifest.path))
        if "old_embedding" in manifests and "old_embedding" != key:
            features = manifests["old_embedding"].path
            manifest.require("features", digest(features), features, rewrite_from_images(manifest.path))
        if "model" in manifest and "old_model" not in found:
            found["old_model"], source = manifest["model"], manifest.path
        found[key] = digest(manifest.path)
    return found


def _files(cfg):
    paths = {key: cfg[key] for key in PATH_KEYS if key not in _OTHER_PATHS and cfg.get(key)}
    if "old_embedding" in paths:
        paths.setdefault("old_embedding_label", label_path(paths["old_embedding"]))
    return {key: path for key, path in paths.items() if pathlib.Path(path).is_file()}
