"""L2: the distance against a plain loop, its gradient at the edges, whole runs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from BCT_methods.L2.loss import feature_l2_loss
from BCT_methods.L2.train import L2
from core.config import ConfigError, load_config
from dataset import RecordDataset
from engine.loader import ExtractLoader
from old_model.old_features import OldFeatures
from tests.BCT_methods.whole_runs import train, without_batch_norm, write_config


def batch(size=6, width=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, size, width, generator=generator, dtype=dtype)
    return new, 3 * old


def slowly(new, old, threshold):
    """One image and one value after the other."""
    total = 0.0
    for f, g in zip(new.tolist(), old.tolist()):
        f_length, g_length = math.sqrt(sum(v * v for v in f)), math.sqrt(sum(v * v for v in g))
        distance = math.sqrt(sum((a / f_length - b / g_length) ** 2 for a, b in zip(f, g)))
        total += max(distance - threshold, 0.0)
    return total / len(new)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 9),
    width=st.integers(2, 7),
    seed=st.integers(0, 999),
    threshold=st.sampled_from([0.0, 0.2, 1.0, 1.5, 2.0]),
)
def test_equals_the_plain_loop(size, width, seed, threshold):
    new, old = batch(size, width, seed)
    assert feature_l2_loss(new, old, threshold).item() == pytest.approx(slowly(new, old, threshold), abs=1e-12)


def test_gradient_is_that_of_the_formula_and_reaches_new_alone():
    new, old = batch()
    new.requires_grad_(), old.requires_grad_()
    assert torch.autograd.gradcheck(lambda new: feature_l2_loss(new, old.detach(), 0.2), (new,))
    feature_l2_loss(new, old).backward()
    assert new.grad.abs().sum() > 0 and old.grad is None


def test_coinciding_features_cost_nothing_and_break_no_gradient():
    new, _ = batch(dtype=torch.float32)
    old = 2 * new
    new.requires_grad_()
    loss = feature_l2_loss(new, old)
    loss.backward()
    assert loss.item() < 1e-6 and torch.isfinite(new.grad).all()
    old = old.clone()
    old[3:] = batch(3, seed=4)[0].float()  # beside others, too
    new.grad = None
    feature_l2_loss(new, old).backward()
    assert torch.isfinite(new.grad).all() and new.grad[3:].abs().sum(dim=1).min() > 0


def test_within_the_threshold_there_is_no_pull_and_beyond_it_all_of_it():
    angles = torch.tensor([0.1, 0.19, 0.21, 1.0], dtype=torch.float64)  # chords 0.1, 0.19, 0.21 and 0.96, nearly
    new = torch.stack([angles.cos(), angles.sin()], dim=1).requires_grad_()
    old = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(4, 2)
    feature_l2_loss(new, old, threshold=0.2).backward()
    pulled = new.grad.norm(dim=1)
    assert pulled[:2].tolist() == [0, 0]
    # d chord / d angle = cos(angle/2): near 1, whatever the distance, as the norm's; a square's would vanish with it.
    torch.testing.assert_close(pulled[2:], (angles[2:] / 2).cos() / 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    new, old = batch(8, 64)
    loss = feature_l2_loss(new.to(dtype), 1000 * old.float())  # squares of 1000 overflow float16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slowly(new, old, 0.0), abs=0.02)


def test_arguments_that_do_not_fit():
    new, old = batch()
    with pytest.raises(ValueError, match="must be .B, D. and .B, d_old."):
        feature_l2_loss(new, old[:4])
    with pytest.raises(ValueError, match="threshold"):
        feature_l2_loss(new, old, -0.1)


# --- whole runs -------------------------------------------------------------------------------------------------


def distance_to_old(folder, backbone):
    """Mean distance of the features of a trained `without_batch_norm` from the old ones."""
    model, data = without_batch_norm(), RecordDataset(folder / "set.rec")
    model.load_state_dict(backbone)
    batch = next(iter(ExtractLoader(data, len(data), "cpu", num_workers=0)))
    old = torch.from_numpy(OldFeatures(data, folder / "old_feature.npy").read(batch.index.numpy()))
    with torch.no_grad():
        return feature_l2_loss(model(batch.images), old).item()


def test_a_run_draws_new_features_to_old_ones_as_far_as_the_threshold_says(folder):
    def after(name, **keys):
        return distance_to_old(folder, train(L2, write_config(folder, "L2", name, num_epoch=8, **keys))[0])

    classified, strong = after("classified", loss_weight=[1, 0]), after("strong")
    weak = after("weak", threshold=1.0)
    assert strong < weak - 0.05 < classified - 0.1


def test_values_that_do_not_fit(folder):
    for keys, message in [
        ({"loss_weight": [1, 10, 1]}, "two numbers"),
        ({"loss_weight": [1, -1]}, "each at least 0"),
        ({"loss_weight": ["1", 10]}, "two numbers"),
        ({"threshold": 3.0}, r"must be in \[0, 2\]"),
    ]:
        with pytest.raises(ConfigError, match=message):
            L2(load_config(write_config(folder, "L2", "run", **keys)))
