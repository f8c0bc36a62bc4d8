"""Read the old model's class means of the new training set and check that they fit it."""

import numpy as np
import torch
import torch.nn.functional as F

from old_model.feature_set import FeatureError, open_array, rewrite_from_images


def load_prototypes(path, num_classes, classes=slice(None)):
    """Read a …_avg_feature.npy, [num_classes, d_old], row = class: the rows `classes`, on the CPU in float32,
    L2-normalised.

    Raises FeatureError for a file that is missing, of another number of classes or not finite.
    """
    if not path:
        raise FeatureError(
            "old_prototype is empty; set it in the config to a …_avg_feature.npy written by get_avg_feature.py"
        )
    try:
        stored = open_array(path, 2, np.floating)
    except FeatureError as error:
        raise FeatureError(f"old_prototype = {error}") from error
    if len(stored) != num_classes:
        raise FeatureError(
            f"{path}: {len(stored)} rows, but the training set has {num_classes} classes: "
            f"the prototypes were made from another record file; {rewrite_from_images(path)}"
        )
    prototypes = np.array(stored[classes], dtype=np.float32)
    if not np.isfinite(prototypes).all():
        raise FeatureError(f"{path}: contains NaN or infinity; {rewrite_from_images(path)}")
    return F.normalize(torch.from_numpy(prototypes), dim=1)
