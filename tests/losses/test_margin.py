"""Margins against the formulas written out sample by sample with Python's math."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses import ArcFace, CombinedMarginLoss, CosFace

MARGINS = {
    "arcface": (lambda: ArcFace(64.0, 0.5), lambda c: arcface_target(c, 0.5), 64.0),
    "arcface wide": (lambda: ArcFace(30.0, 1.2), lambda c: arcface_target(c, 1.2), 30.0),
    "arcface none": (lambda: ArcFace(10.0, 0.0), lambda c: arcface_target(c, 0.0), 10.0),
    "cosface": (lambda: CosFace(64.0, 0.4), lambda c: c - 0.4, 64.0),
    "combined as arcface": (lambda: CombinedMarginLoss(64.0, 1.0, 0.5, 0.0), lambda c: arcface_target(c, 0.5), 64.0),
    "combined as cosface": (lambda: CombinedMarginLoss(64.0, 1.0, 0.0, 0.35), lambda c: c - 0.35, 64.0),
    "combined": (lambda: CombinedMarginLoss(32.0, 0.9, 0.4, 0.15), lambda c: combined_target(c, 0.9, 0.4, 0.15), 32.0),
    "sphereface": (lambda: CombinedMarginLoss(32.0, 1.35, 0, 0), lambda c: combined_target(c, 1.35, 0, 0), 32.0),
}


def arcface_target(cosine, margin):
    if cosine > math.cos(math.pi - margin):
        return math.cos(math.acos(cosine) + margin)
    return cosine - margin * math.sin(math.pi - margin)


def combined_target(cosine, m1, m2, m3):
    return math.cos(m1 * math.acos(cosine) + m2) - m3


def slow(cosines, labels, target, s, threshold=0.0):
    rows = []
    for row, label in zip(cosines.tolist(), labels.tolist()):
        out = [0.0 if threshold > 0 and value > threshold else value for value in row]
        if label != -1:
            out[label] = target(row[label])
        rows.append([s * value for value in out])
    return torch.tensor(rows, dtype=cosines.dtype)


def batch(rows=9, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.rand(rows, classes, dtype=torch.float64, generator=generator) * 2 - 1
    labels = torch.randint(-1, classes, (rows,), generator=generator)
    labels[0] = -1
    cosines[1:5, 2] = torch.tensor([-0.99, -0.9, 0.3, 0.97])  # covers both branches of ArcFace
    labels[1:5] = 2
    return cosines, labels


@pytest.mark.parametrize("name", MARGINS)
def test_values_are_those_of_the_formula(name):
    make, target, s = MARGINS[name]
    cosines, labels = batch()
    before = cosines.clone()
    expected = slow(cosines, labels, target, s)
    torch.testing.assert_close(make()(cosines, labels), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(make()(cosines, labels.unsqueeze(1)), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(make()(cosines.float(), labels), expected.float(), rtol=1e-5, atol=2e-5)
    assert torch.equal(cosines, before)


@pytest.mark.parametrize("name", MARGINS)
def test_gradients_are_those_of_finite_differences(name):
    margin = MARGINS[name][0]()
    cosines, labels = batch()
    cosines.clamp_(-0.995, 0.995).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: margin(x, labels), cosines)


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_nan_or_inf_at_and_beyond_one(name, dtype):
    edge = torch.tensor([1.0, -1.0, 1.0009765625, -1.0009765625, 1 - 2**-11, -1 + 2**-11, 0.0], dtype=torch.float64)
    cosines = edge.to(dtype).unsqueeze(1).repeat(1, 3).requires_grad_()
    logits = MARGINS[name][0]()(cosines, torch.arange(7) % 3)
    assert logits.dtype == dtype and logits.isfinite().all()
    logits.float().sum().backward()
    assert cosines.grad.dtype == dtype and cosines.grad.isfinite().all()
    assert cosines.grad.abs().max() <= 64 * 1.35 * 1000


def test_half_precision_computes_the_target_in_float32():
    cosines = torch.linspace(-0.9, 0.9, 41).unsqueeze(1).repeat(1, 2).half()
    logits = ArcFace(1.0, 0.5)(cosines, torch.zeros(41, dtype=torch.long))
    expected = [arcface_target(c, 0.5) for c in cosines[:, 0].tolist()]
    assert torch.equal(logits[:, 0], torch.tensor(expected).half())  # rounded once, at the end


@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
def test_rows_whose_class_is_elsewhere_are_only_scaled(label_dtype):
    cosines, _ = batch()
    labels = torch.full((9,), -1, dtype=label_dtype)
    cosines.requires_grad_()
    logits = ArcFace(64.0, 0.5)(cosines, labels)
    assert torch.equal(logits, cosines * 64)
    logits.sum().backward()
    assert (cosines.grad == 64).all()


@pytest.mark.parametrize("margins", [(1.0, 0.5, 0.0), (1.0, 0.0, 0.4), (0.9, 0.4, 0.15)])
def test_interclass_filtering_drops_other_classes_and_their_gradient(margins):
    cosines, labels = batch(rows=20, seed=3)
    labels[:6] = torch.tensor([-1, -1, -1, 0, 0, 0])
    cosines[:6, 0] = torch.tensor([0.9, 0.3, -0.5, 0.9, 0.3, -0.5])  # column 0, target and not, above and below
    cosines.clamp_(-0.99, 0.99).requires_grad_()
    margin = CombinedMarginLoss(16.0, *margins, interclass_filtering_threshold=0.4)
    plain = CombinedMarginLoss(16.0, *margins)

    logits = margin(cosines, labels)
    target = {0.5: lambda c: arcface_target(c, 0.5), 0.0: lambda c: c - 0.4}.get(
        margins[1], lambda c: combined_target(c, *margins)
    )
    torch.testing.assert_close(logits, slow(cosines.detach(), labels, target, 16.0, 0.4))

    own = torch.zeros_like(cosines, dtype=torch.bool)
    own[labels >= 0, labels[labels >= 0]] = True
    filtered = (cosines > 0.4) & ~own
    assert filtered.any() and (logits[filtered] == 0).all()
    logits.sum().backward()
    grad, cosines.grad = cosines.grad, None
    plain(cosines, labels).sum().backward()
    assert (grad[filtered] == 0).all()
    assert torch.equal(grad[~filtered], cosines.grad[~filtered])


def test_the_input_stays_usable_in_other_terms():
    cosines, labels = batch()
    cosines.clamp_(-0.99, 0.99).requires_grad_()
    margin = ArcFace(4.0, 0.5)

    def both(x):
        y = x.exp()  # saves its output, which an in-place margin would corrupt
        return margin(y / 3, labels).sum() + (y**2).sum()

    assert torch.autograd.gradcheck(both, cosines)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, math.pi / 2), st.lists(st.floats(-1, 1), min_size=2, max_size=20))
def test_arcface_target_never_rises_with_the_angle(margin, cosines):
    cosines = torch.tensor(sorted(cosines), dtype=torch.float64).unsqueeze(1)
    targets = ArcFace(1.0, margin)(cosines, torch.zeros(len(cosines), dtype=torch.long)).squeeze(1)
    assert (targets.diff() >= -1e-9).all()
    assert (targets <= cosines.squeeze(1) + 1e-9).all()  # harder, never easier


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="do not match"):
        ArcFace()(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="radians"):
        ArcFace(64.0, 30)
    with pytest.raises(ValueError, match="scale"):
        CosFace(0.0)
