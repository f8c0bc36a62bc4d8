"""Read the old model's class means of the new training set and check that they fit it."""

import numpy as np
import torch
import torch.nn.functional as F

from old_model.feature_set import FeatureError, open_array, rewrite_from_images


def load_prototypes(path, num_classes, embedding_size):
    """Read a …_avg_feature.npy: float32 [num_classes, embedding_size] on the CPU, rows L2-normalised, row = class.

    Raises FeatureError for a file that is missing, of another shape or not finite.
    """
    if not path:
        raise FeatureError(
            "old_prototype is empty; set it in the config to a …_avg_feature.npy written by get_avg_feature.py"
        )
    prototypes = np.array(open_array(path, 2, np.floating), dtype=np.float32)
    classes, width = prototypes.shape
    if width != embedding_size:
        raise FeatureError(
            f"{path}: prototypes of width {width}, but embedding_size is {embedding_size}; "
            "set embedding_size to the old model's, or use prototypes of that width; "
            f"if the old model has changed since, {rewrite_from_images(path)}"
        )
    if classes != num_classes:
        raise FeatureError(
            f"{path}: {classes} rows, but the training set has {num_classes} classes: "
            f"the prototypes were made from another record file; {rewrite_from_images(path)}"
        )
    if not np.isfinite(prototypes).all():
        raise FeatureError(f"{path}: contains NaN or infinity; {rewrite_from_images(path)}")
    return F.normalize(torch.from_numpy(prototypes), dim=1)
