"""The softmax over old prototypes: against a plain loop, its gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.distributed import rank, rows_of_rank
from losses import OldPrototypes, old_prototype_loss
from losses.classifier import sharded_tensors
from tests.ranks import run_ranks


def batch(size=6, classes=4, width=5, seed=0, lengths=(1.0,)):
    """The prototypes' norms cycle through `lengths`: 1 as for BCT, others as for UniBCT's raw class means."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = 3 * torch.randn(size, width, generator=generator, dtype=torch.float64)
    prototypes = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (size,), generator=generator)
    norms = torch.tensor([lengths[c % len(lengths)] for c in range(classes)], dtype=torch.float64)
    return embeddings, labels, norms[:, None] * torch.nn.functional.normalize(prototypes, dim=1)


def slowly(embeddings, labels, prototypes, scale):
    """One image and one class after the other."""
    total = 0.0
    for row, label in zip(embeddings.tolist(), labels.tolist()):
        length = math.sqrt(sum(value * value for value in row))
        logits = [scale * sum(a / length * b for a, b in zip(row, prototype)) for prototype in prototypes.tolist()]
        largest = max(logits)  # scale times a long prototype would overflow
        total -= logits[label] - largest - math.log(sum(math.exp(logit - largest) for logit in logits))
    return total / len(embeddings)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 9),
    classes=st.integers(1, 7),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1.0, 16.0, 64.0]),
    lengths=st.sampled_from([(1.0,), (6.0, 11.8, 0.5)]),
)
def test_equals_the_plain_loop(size, classes, seed, scale, lengths):
    inputs = batch(size, classes, seed=seed, lengths=lengths)
    assert old_prototype_loss(*inputs, scale).item() == pytest.approx(slowly(*inputs, scale), abs=1e-10)


def test_gradient_is_that_of_the_formula_and_reaches_the_embeddings_alone():
    embeddings, labels, prototypes = batch()
    embeddings.requires_grad_(), prototypes.requires_grad_()
    assert torch.autograd.gradcheck(lambda e: old_prototype_loss(e, labels, prototypes.detach(), 4.0), (embeddings,))
    old_prototype_loss(embeddings, labels, prototypes).backward()
    assert embeddings.grad.abs().sum() > 0 and prototypes.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    embeddings, labels, prototypes = batch(8, 4, 64)
    embeddings = 300 * embeddings  # whose squares overflow float16
    loss = old_prototype_loss(embeddings.to(dtype), labels, prototypes.float(), 16.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slowly(embeddings, labels, prototypes, 16.0), abs=0.1)


def test_arguments_that_do_not_fit():
    embeddings, labels, prototypes = batch()
    with pytest.raises(ValueError, match="must be .B, D. and .C, d_old."):
        old_prototype_loss(embeddings, labels, prototypes[0])
    with pytest.raises(ValueError, match="scale"):
        old_prototype_loss(embeddings, labels, prototypes, 0.0)


# --- sharded ----------------------------------------------------------------------------------------------------


def _sharded(world_size, scale, lengths):
    """Loss and this rank's gradient, of its share of the global batch of twelve."""
    embeddings, labels, prototypes = batch(12, 7, lengths=lengths)
    start, stop = rows_of_rank(12, rank(), world_size)
    mine = embeddings[start:stop].requires_grad_()
    old = OldPrototypes(7, 5, stored=True).double()
    old.prototypes = prototypes[old.classes]
    loss = old(mine, labels[start:stop], scale)
    loss.backward()
    return loss.item(), mine.grad, len(old.prototypes)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sharded_over_ranks_it_is_the_loss_of_the_global_batch(world_size):
    scale, lengths = 16.0, (6.0, 0.5)
    embeddings, labels, prototypes = batch(12, 7, lengths=lengths)
    whole = old_prototype_loss(embeddings.requires_grad_(), labels, prototypes, scale)
    whole.backward()
    ranks = (
        [_sharded(1, scale, lengths)]
        if world_size == 1
        else run_ranks(_sharded, world_size, world_size, scale, lengths)
    )
    assert [loss for loss, _, _ in ranks] == pytest.approx([whole.item()] * world_size, abs=1e-12)
    torch.testing.assert_close(torch.cat([gradient for _, gradient, _ in ranks]), embeddings.grad, rtol=0, atol=1e-12)
    assert sum(count for _, _, count in ranks) == 7


def test_only_stored_prototypes_are_in_checkpoints():
    for stored in (True, False):
        old = OldPrototypes(4, 5, stored)
        assert list(old.state_dict()) == ["prototypes"] * stored
        assert [name for name, _, _ in sharded_tensors(old)] == ["prototypes"] * stored
