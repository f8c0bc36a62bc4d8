"""The old model's class means of the new training set, read and held against it."""

import numpy as np
import torch
import torch.nn.functional as F

from engine.features import FeatureError, again, open_array


def load_prototypes(path, num_classes, embedding_size):
    """Read a …_avg_feature.npy: float32 [num_classes, embedding_size] on the CPU, rows L2-normalised, row = class.

    Raises FeatureError, with what to do, for a file that is missing, of another shape or not finite.
    """
    if not path:
        raise FeatureError(
            "old_prototype is empty; set it in the config to a …_avg_feature.npy that get_avg_feature.py has written"
        )
    prototypes = np.array(open_array(path, 2, np.floating), dtype=np.float32)
    classes, width = prototypes.shape
    if width != embedding_size:
        raise FeatureError(
            f"{path}: prototypes of width {width}, but embedding_size is {embedding_size}; "
            "set embedding_size to the old model's, or take the prototypes of an old model of that width"
        )
    if classes != num_classes:
        raise FeatureError(
            f"{path}: {classes} rows, but the training set has {num_classes} classes: "
            f"the prototypes were made from another record file; {again(path)}"
        )
    if not np.isfinite(prototypes).all():
        raise FeatureError(f"{path}: holds NaN or infinity; {again(path)}")
    return F.normalize(torch.from_numpy(prototypes), dim=1)
