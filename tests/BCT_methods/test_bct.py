"""BCT: the prototypes' file, whole runs. The term's own tests are in tests/losses/test_prototype.py."""

import numpy as np
import pytest
import torch

from BCT_methods.BCT.prototypes import load_prototypes
from BCT_methods.BCT.train import BCT
from core.config import load_config
from dataset import RecordDataset
from engine.loader import ExtractLoader
from old_model.feature_set import FeatureError
from tests.BCT_methods.whole_runs import REPO, train, without_batch_norm, write_config

CONFIGS = REPO / "BCT_methods" / "BCT" / "configs"


# --- the prototypes' file ---------------------------------------------------------------------------------------


def test_prototypes_come_normalised(tmp_path):
    rows = np.random.default_rng(0).normal(size=(3, 4))
    np.save(tmp_path / "p.npy", rows)
    prototypes = load_prototypes(tmp_path / "p.npy", 3)
    assert prototypes.dtype == torch.float32
    np.testing.assert_allclose(prototypes, rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize(
    "rows, message",
    [
        (np.ones((2, 4)), "2 rows, but .* has 3 classes.*get_feature.py .* && python .*get_avg_feature.py --SD"),
        (np.full((3, 4), np.nan), "NaN"),
        (np.ones((3, 4), int), "expected 2-D floating"),
    ],
)
def test_prototypes_that_do_not_fit(tmp_path, rows, message):
    path = tmp_path / "OPclass" / "f4_r18_arc_class70_avg_feature.npy"
    path.parent.mkdir()
    np.save(path, rows)
    with pytest.raises(FeatureError, match=message):
        load_prototypes(path, 3)


def test_prototypes_that_are_not_there(tmp_path):
    with pytest.raises(FeatureError, match="^old_prototype = .*get_avg_feature.py --SD f4_r18_arc_class70"):
        load_prototypes(tmp_path / "OPclass" / "f4_r18_arc_class70_avg_feature.npy", 3)
    with pytest.raises(FeatureError, match="old_prototype is empty"):
        load_prototypes("", 3)


# --- whole runs -------------------------------------------------------------------------------------------------


def cosine_to_prototypes(folder, backbone):
    """Mean cosine of the features of a trained `without_batch_norm` and the prototypes of their classes."""
    model, data = without_batch_norm(), RecordDataset(folder / "set.rec")
    model.load_state_dict(backbone)
    batch = next(iter(ExtractLoader(data, len(data), "cpu", num_workers=0)))
    prototypes = load_prototypes(folder / "old_avg_feature.npy", 5)
    with torch.no_grad():
        return torch.nn.functional.cosine_similarity(model(batch.images), prototypes[batch.labels]).mean().item()


def test_a_run_draws_new_features_to_the_prototypes_the_more_the_higher_the_scale(folder):
    weak, strong = (
        cosine_to_prototypes(folder, train(BCT, write_config(folder, "BCT", f"{scale}", scale=scale, num_epoch=8))[0])
        for scale in (0.01, 16.0)
    )
    assert strong > weak + 0.2


def test_values_and_files_that_do_not_fit(folder):
    def start(**keys):
        return BCT(load_config(write_config(folder, "BCT", "run", **keys)))

    np.save(folder / "old_avg_feature.npy", np.ones((4, 8)))
    with pytest.raises(FeatureError, match="4 rows, but the training set has 5 classes"):
        start()
