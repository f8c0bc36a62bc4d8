"""LCE: alignment, boundary and the old classes against plain loops, gradients, several ranks against one, a run."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from BCT_methods.LCE.loss import boundary_loss, center_alignment_loss
from BCT_methods.LCE.old_classes import old_classes
from BCT_methods.LCE.train import LCE
from core import distributed
from core.config import ConfigError, load_config
from old_model import by_class
from old_model.feature_set import FeatureError
from tests.BCT_methods.whole_runs import train, write_config
from tests.ranks import run_ranks

WIDTH, CLASSES = 5, 7


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(by_class, "CHUNK", 7)


def unit(row):
    return row / (row * row).sum() ** 0.5


def centres(seed=0, classes=CLASSES):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, classes, WIDTH, generator=generator, dtype=torch.float64) * torch.tensor([[[0.01]], [[1.0]]])


# --- alignment --------------------------------------------------------------------------------------------------


def alignment_slowly(weight, old):
    """One entry after the other."""
    entries = [(a - b) ** 2 for row, target in zip(weight, old) for a, b in zip(unit(row), unit(target))]
    return sum(entries) / len(entries)


def test_alignment_against_a_loop():
    weight, old = centres()
    weight.requires_grad_(), old.requires_grad_()
    loss, expected = center_alignment_loss(weight, old), alignment_slowly(weight, old.detach())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(expected, weight)
    loss.backward()
    torch.testing.assert_close(weight.grad, grad, rtol=1e-9, atol=1e-14)
    assert old.grad is None


def test_alignment_ends_where_the_centres_coincide():
    _, old = centres()
    weight = (0.3 * old).requires_grad_()
    loss = center_alignment_loss(weight, old)
    loss.backward()
    assert abs(loss.item()) < 1e-15 and weight.grad.abs().max() < 1e-15


def test_a_class_without_old_images_is_not_aligned():
    weight, old = centres()
    old[3] = 0
    weight.requires_grad_()
    loss = center_alignment_loss(weight, old)
    others = [0, 1, 2, 4, 5, 6]
    torch.testing.assert_close(loss, alignment_slowly(weight[others], old[others]))
    loss.backward()
    assert not weight.grad[3].any() and weight.grad[others].any(dim=1).all()


def test_the_gradient_that_the_readme_states():
    """100 · 2 · distance / (C·D) at a unit centre: 4.2e-6 for 93,431 classes of 512 dimensions. Here 10 of them."""
    weight, old = torch.eye(10, 512, dtype=torch.float64), torch.eye(10, 512, dtype=torch.float64)
    old[4, 4], old[4, 5] = 0.5, 0.75**0.5  # 60 degrees: distance 1
    weight.requires_grad_()
    (100 * center_alignment_loss(weight, old)).backward()
    along_the_sphere = 0.75**0.5  # of the chord's pull: cos 30 degrees
    assert weight.grad[4].norm().item() * 10 / 93_431 == pytest.approx(4.18e-6 * along_the_sphere, rel=1e-3)


# --- boundary ---------------------------------------------------------------------------------------------------


def images(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    new = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return new, labels, centres(seed)[1], torch.rand(CLASSES, generator=generator, dtype=torch.float64) - 0.3


def boundary_slowly(new, labels, old_centers, min_cosine):
    total = 0
    for feature, label in zip(new, labels.tolist()):
        gap = min_cosine[label] - (unit(feature) * unit(old_centers[label])).sum()
        total = total + gap * (gap > 0)
    return total / len(new)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 20), seed=st.integers(0, 999))
def test_boundary_against_a_loop(size, seed):
    new, *classes = images(size, seed)
    new.requires_grad_()
    loss, expected = boundary_loss(new, *classes), boundary_slowly(new, *classes)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-15)
    for one, other in zip(torch.autograd.grad(loss, new), torch.autograd.grad(expected, new)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


def test_only_images_outside_are_pulled():
    old, kappa = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([0.8]).double()
    angles = torch.tensor([0.1, 0.6, 0.7, 3.0], dtype=torch.float64)  # arccos 0.8 is 0.64
    new = torch.stack([angles.cos(), angles.sin()], dim=1).requires_grad_()
    loss = boundary_loss(new, torch.zeros(4, dtype=torch.int64), old, kappa)
    loss.backward()
    assert loss.item() == pytest.approx(sum(0.8 - angles[2:].cos()).item() / 4)
    torch.testing.assert_close(new.grad.norm(dim=1), torch.tensor([0, 0, *angles[2:].sin()]).double() / 4)


def test_no_image_of_a_class_without_old_images_lies_outside():
    new, _, old, kappa = images(6)
    old[2], kappa[2] = 0, -1
    new.requires_grad_()
    loss = boundary_loss(new, torch.full((6,), 2), old, kappa)
    loss.backward()
    assert loss.item() == 0 and not new.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    new, labels, old, kappa = images(20)
    loss = boundary_loss(1000 * new.to(dtype), labels, old.float(), kappa.float())  # squares overflow float16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(boundary_slowly(new, labels, old, kappa).item(), abs=0.01)


def test_arguments_that_do_not_fit():
    new, labels, old, kappa = images(6)
    with pytest.raises(ValueError, match="must be .num_local, D. and .num_local, d_old."):
        center_alignment_loss(old, old[:4])
    for arguments in ((new[0], labels, old, kappa), (new, labels[:3], old, kappa)):
        with pytest.raises(ValueError, match="must be .B, D., .B. and .C, d_old."):
            boundary_loss(*arguments)
    with pytest.raises(ValueError, match=r"min_cosine \[6\] must be \[C\]"):
        boundary_loss(new, labels, old, kappa[:6])


# --- the old classes --------------------------------------------------------------------------------------------


def old_set(size=40, seed=0, dtype=np.float32):
    """Features of any length in random order; class 2 has one, class 5 none, 6 zeros alone, 0 zeros among others."""
    random = np.random.default_rng(seed)
    labels = random.choice([0, 1, 3, 4], size)
    features = random.normal(size=(CLASSES, WIDTH))[labels] + 0.4 * random.normal(size=(size, WIDTH))
    features *= random.uniform(0.1, 20, (size, 1))
    labels[[8, 30, 31]], features[[30, 31]] = [2, 6, 0], 0
    return types.SimpleNamespace(features=features.astype(dtype), labels=labels)


def old_classes_slowly(old):
    means, smallest = np.zeros((CLASSES + 1, WIDTH)), -np.ones(CLASSES + 1)  # the last: other ranks' classes
    for c in range(CLASSES):
        rows = [unit(row) for row in old.features[old.labels == c].astype(np.float64) if row.any()]
        if rows:
            means[c] = unit(sum(rows) / len(rows))
            smallest[c] = min(row @ means[c] for row in rows)
    return means, smallest


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_old_classes_against_loops(dtype):
    old = old_set(dtype=dtype)
    for array, expected in zip(old_classes(old, CLASSES, 0, CLASSES), old_classes_slowly(old)):
        assert array.dtype == torch.float32
        np.testing.assert_allclose(array.numpy(), expected, rtol=0, atol=1e-6)


def test_no_old_image_lies_outside_its_own_class():
    old = old_set(seed=1)
    classes = old_classes(old, CLASSES, 0, CLASSES)
    features = torch.from_numpy(old.features)[old.features.any(axis=1)]
    labels = torch.from_numpy(old.labels)[old.features.any(axis=1)]
    assert boundary_loss(features, labels, *classes) < 1e-6
    tighter = classes[1] + 0.01 * (classes[1] > -1)
    assert boundary_loss(features, labels, classes[0], tighter) > 1e-4


def test_files_that_do_not_fit(tmp_path):
    old = old_set()
    with pytest.raises(FeatureError, match="labels go from 0 to 6, but there are 6 classes"):
        old_classes(old, 6, 0, 6)
    old.features[16] = np.nan
    np.save(tmp_path / "x_feature.npy", old.features)
    old.features = np.load(tmp_path / "x_feature.npy", mmap_mode="r")
    with pytest.raises(FeatureError, match=r"x_feature.npy: row 16 is not finite; rewrite it: python .*get_feature.py"):
        old_classes(old, CLASSES, 0, CLASSES)


# --- ranks ------------------------------------------------------------------------------------------------------


def alignment_on_rank():
    """The old classes of this rank's share, without the last row; their alignment, and its gradient."""
    by_class.CHUNK = 7
    start, stop = distributed.rows_of_rank(CLASSES, distributed.rank(), distributed.world_size())
    centers, min_cosine = old_classes(old_set(41, seed=2), CLASSES, start, stop)
    assert not centers[-1].any() and min_cosine[-1] == -1
    centers, min_cosine = centers[:-1], min_cosine[:-1]
    weight = centres()[0][start:stop].requires_grad_()
    loss = center_alignment_loss(weight, centers)
    return loss.detach(), centers, min_cosine, torch.autograd.grad(loss, weight)[0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_the_classes_the_alignment_and_the_gradients_of_one(ranks):
    loss, *expected = alignment_on_rank()
    results = run_ranks(alignment_on_rank, ranks)
    for theirs, *_ in results:
        torch.testing.assert_close(theirs, loss, rtol=1e-6, atol=0)
    for number, one in enumerate(expected, start=1):
        torch.testing.assert_close(torch.cat([theirs[number] for theirs in results]), one, rtol=1e-6, atol=1e-9)


# --- whole runs -------------------------------------------------------------------------------------------------


def test_terms_and_their_gradients_have_their_weights(folder):
    trainer = LCE(load_config(write_config(folder, "LCE", "run", align_weight=7.0, boundary_weight=3.0)))
    trainer.loader.set_epoch(0)
    batch, old = next(iter(trainer.loader)), old_classes(trainer.old, 5, 0, 5)
    new = trainer.backbone(batch.images).detach().requires_grad_()
    trainer.backbone = lambda images: new
    terms, weight = trainer.losses(batch), trainer.classifier.weight
    expected = {
        "align": (7 * center_alignment_loss(weight, old[0][:-1]), weight),
        "boundary": (3 * boundary_loss(new, batch.labels, *old), new),
    }
    for name, (value, leaf) in expected.items():
        torch.testing.assert_close(terms[name], value)
        (grad,), (plain,) = torch.autograd.grad(terms[name], leaf), torch.autograd.grad(value, leaf)
        torch.testing.assert_close(grad, plain)
        assert grad.abs().max() > 1e-3


def test_a_run_draws_the_class_centres_to_the_old_ones_as_its_weight_says(folder):
    old = LCE(load_config(write_config(folder, "LCE", "old"))).old_centers[:-1]

    def after(weight):
        _, trained, _ = train(LCE, write_config(folder, "LCE", f"run_{weight}", num_epoch=6, align_weight=weight))
        return center_alignment_loss(trained, old).item()

    without, usual, strong = (after(weight) for weight in (0.0, 10.0, 100.0))
    assert strong < 0.5 * usual < 0.4 * without


def test_sampled_centres_cannot_be_aligned(folder):
    with pytest.raises(ConfigError, match="sample_rate = 0.5; it must be 1 with align_weight = 100.0: .*= 0"):
        LCE(load_config(write_config(folder, "LCE", "run", sample_rate=0.5)))
    path = write_config(folder, "LCE", "run", sample_rate=0.5, align_weight=0.0)
    trainer = LCE(load_config(path))
    trainer.loader.set_epoch(0)
    assert trainer.losses(next(iter(trainer.loader))).keys() == {"cls", "boundary"}
