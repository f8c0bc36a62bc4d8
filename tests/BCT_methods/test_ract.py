"""RACT: the contrastive term against a plain loop, its gradients, several ranks against one, what a run does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from BCT_methods.RACT.loss import ract_loss
from BCT_methods.RACT.train import RACT
from core import distributed
from core.config import load_config
from tests.BCT_methods.whole_runs import write_config
from tests.ranks import run_ranks


def batch(size=8, width=5, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, size, width, generator=generator, dtype=torch.float64)
    return new, 3 * old, torch.randint(classes, (size,), generator=generator)


def slowly(new, old, labels, temperature, negatives, others=None):
    """One image after the other; `others`: what is taken for the negatives' new features."""
    others = new if others is None else others
    total = 0

    def cosine(a, b):
        return (a * b).sum() / (a * a).sum().sqrt() / (b * b).sum().sqrt()

    for i in range(len(labels)):
        foreign = [k for k in range(len(labels)) if labels[k] != labels[i]]
        positive = (cosine(new[i], old[i]) / temperature).exp()
        below = positive
        for rows in (old, others):
            hardest = sorted((cosine(new[i], rows[k]) for k in foreign), reverse=True)[:negatives]
            below = below + sum((one / temperature).exp() for one in hardest)
        total = total - (positive / below).log()
    return total / len(labels)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 9),
    classes=st.integers(1, 9),
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.01, 0.1, 1.0]),
    negatives=st.sampled_from([1, 2, 10]),
)
def test_equals_the_plain_loop(size, classes, seed, temperature, negatives):
    new, old, labels = batch(size, classes=classes, seed=seed)
    loss = ract_loss(new, old, labels, temperature, negatives)
    torch.testing.assert_close(loss, slowly(new, old, labels, temperature, negatives), rtol=1e-9, atol=1e-12)


def test_published_values_are_the_defaults():
    new, old, labels = batch(40, width=500, classes=30)  # nearly orthogonal: the tenth counts beside the first
    torch.testing.assert_close(ract_loss(new, old, labels), slowly(new, old, labels, 0.01, 10), rtol=1e-9, atol=0)


def test_an_image_without_negatives_costs_nothing():
    new, old, _ = batch()
    new.requires_grad_()
    loss = ract_loss(new, old, torch.zeros(len(new), dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and not new.grad.any()


@pytest.mark.parametrize("negative_grad", [False, True])
def test_gradient_with_constant_negatives_and_without(negative_grad):
    new, old, labels = batch()
    new.requires_grad_(), old.requires_grad_()
    (grad,) = torch.autograd.grad(ract_loss(new, old, labels, 0.3, 2, negative_grad), new)
    others = new if negative_grad else new.detach()
    (expected,) = torch.autograd.grad(slowly(new, old, labels, 0.3, 2, others), new)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)
    ract_loss(new, old, labels, 0.3, 2, negative_grad).backward()
    assert old.grad is None


def test_the_key_makes_a_difference_to_the_gradient_alone():
    new, old, labels = batch()
    new.requires_grad_()
    values = [ract_loss(new, old, labels, 0.3, 2, negative_grad) for negative_grad in (False, True)]
    first, second = (torch.autograd.grad(value, new)[0] for value in values)
    assert values[0] == values[1] and (first - second).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    new, old, labels = batch(8, 64)
    loss = ract_loss(new.to(dtype), 1000 * old.float(), labels, 0.1)  # squares of 1000 overflow float16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slowly(new, old, labels, 0.1, 10).item(), rel=0.02)


def test_arguments_that_do_not_fit():
    new, old, labels = batch()
    for arguments in ((new, old[:4], labels), (new[0], old[0], labels[0]), (new, old, labels[:3])):
        with pytest.raises(ValueError, match="must be .B, D. and .B, d_old."):
            ract_loss(*arguments)
    for temperature, negatives in ((0.0, 1), (math.nan, 1), (0.1, 0)):
        with pytest.raises(ValueError, match="must be above 0 and negatives = . at least 1"):
            ract_loss(new, old, labels, temperature, negatives)


# --- ranks ------------------------------------------------------------------------------------------------------


def loss_on_rank(negative_grad):
    """The loss of this rank's rows of 12, and its gradient to them."""
    new, old, labels = batch(12, classes=6, seed=3)
    rows = 12 // distributed.world_size()
    mine = slice(distributed.rank() * rows, (distributed.rank() + 1) * rows)
    new = new[mine].requires_grad_()
    loss = ract_loss(new, old[mine], labels[mine], 0.3, 4, negative_grad)
    return loss.detach(), torch.autograd.grad(loss, new)[0]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("negative_grad", [False, True])
def test_ranks_have_the_loss_and_the_gradients_of_one(negative_grad, ranks):
    loss, grad = loss_on_rank(negative_grad)
    results = run_ranks(loss_on_rank, ranks, negative_grad)
    for theirs, _ in results:
        torch.testing.assert_close(theirs, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([theirs for _, theirs in results]), grad, rtol=1e-9, atol=1e-12)


# --- a run ------------------------------------------------------------------------------------------------------


def test_a_run_uses_its_keys(folder):
    """The term as the keys say, and the gradient of the negatives only with negative_grad."""
    keys = {"ract_weight": 3.0, "temperature": 0.5, "negatives": 2}
    grads = []
    for negative_grad in (False, True):
        trainer = RACT(load_config(write_config(folder, "RACT", "run", **keys, negative_grad=negative_grad)))
        trainer.loader.set_epoch(0)
        batch = next(iter(trainer.loader))
        new = torch.randn(len(batch.labels), trainer.cfg.embedding_size, generator=torch.Generator().manual_seed(0))
        new.requires_grad_()
        trainer.backbone = lambda images: new
        term = trainer.losses(batch)["ract"]
        torch.testing.assert_close(term, 3 * ract_loss(new, batch.old, batch.labels, 0.5, 2))
        grads.append(torch.autograd.grad(term, new)[0])
    assert (grads[0] - grads[1]).abs().max() > 1e-3
