import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from BCT_methods.MixBCT.mix import mix_old_features


def batch(size=16, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    new = torch.randn(size, width, generator=generator)
    old = 3 * torch.randn(size, width, generator=generator)
    return new, old


def replaced_rows(mixed, new):
    return (mixed != new).any(dim=1)


def mix_slowly(embeddings, old_features, credible, mix_ratio, generator):
    """One row after the other, as the paper says it."""
    candidates = [row for row in range(len(embeddings)) if credible[row]]
    order = torch.randperm(len(candidates), generator=generator).tolist()
    drawn = [candidates[place] for place in order][: int(len(embeddings) * mix_ratio)]
    rows = []
    for row in range(len(embeddings)):
        rows.append(old_features[row] / old_features[row].norm() if row in drawn else embeddings[row])
    return torch.stack(rows)


@settings(max_examples=60, deadline=None)
@given(
    credible=st.lists(st.booleans(), min_size=1, max_size=24),
    ratio=st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_plain_loop(credible, ratio, seed):
    new, old = batch(len(credible), seed=seed)
    credible = torch.tensor(credible)
    mixed = mix_old_features(new, old, credible, ratio, torch.Generator().manual_seed(seed))
    expected = mix_slowly(new, old, credible, ratio, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(mixed, expected)
    changed = replaced_rows(mixed, new)
    assert changed.sum() == min(int(len(credible) * ratio), int(credible.sum()))
    assert not (changed & ~credible).any()
    torch.testing.assert_close(mixed[changed].norm(dim=1), torch.ones(int(changed.sum())))


def test_gradient_reaches_the_kept_rows_alone():
    new, old = batch()
    new.requires_grad_(), old.requires_grad_()
    mixed = mix_old_features(new, old, torch.ones(16, dtype=torch.bool), 0.5, torch.Generator().manual_seed(1))
    changed = replaced_rows(mixed.detach(), new.detach())
    weights = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    (mixed * weights).sum().backward()
    assert changed.sum() == 8
    assert torch.equal(new.grad[~changed], weights[~changed])
    assert not new.grad[changed].any()
    assert old.grad is None


def test_a_broken_embedding_that_is_replaced_leaves_no_trace():
    new, old = batch(4)
    new[2] = float("nan")
    new.requires_grad_()
    mixed = mix_old_features(new, old, torch.tensor([False, False, True, False]), 0.3)
    mixed.square().sum().backward()
    assert torch.isfinite(mixed).all() and torch.isfinite(new.grad).all()


def test_every_credible_row_is_drawn_equally_often():
    new, old = batch(8)
    credible = torch.tensor([True, True, False, True, True, True, False, True])
    generator = torch.Generator().manual_seed(3)
    times = sum(replaced_rows(mix_old_features(new, old, credible, 0.25, generator), new).int() for _ in range(3000))
    assert not times[~credible].any()
    # 2 of 6 rows a draw: 1000 expected, standard deviation 26.
    assert (times[credible] - 1000).abs().max() < 130


def test_the_generator_decides_the_draw_and_nothing_else_does():
    new, old = batch(64)
    credible = torch.ones(64, dtype=torch.bool)
    torch.manual_seed(1)
    one = mix_old_features(new, old, credible, 0.3, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    assert torch.equal(one, mix_old_features(new, old, credible, 0.3, torch.Generator().manual_seed(5)))
    assert not torch.equal(one, mix_old_features(new, old, credible, 0.3, torch.Generator().manual_seed(6)))
    torch.manual_seed(1)
    two = mix_old_features(new, old, credible, 0.3)
    torch.manual_seed(1)
    assert torch.equal(two, mix_old_features(new, old, credible, 0.3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_embeddings_dtype(dtype):
    new, old = batch()
    # Squares of 1000 overflow float16: the length is taken in float32.
    mixed = mix_old_features(new.to(dtype), 1000 * old, torch.ones(16, dtype=torch.bool), 1.0)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.float(), torch.nn.functional.normalize(old, dim=1), atol=4e-3, rtol=0)


def test_arguments_that_do_not_fit():
    new, old = batch()
    credible = torch.ones(16, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\[16, 8\] and old features \[4, 8\] must be"):
        mix_old_features(new, old[:4], credible, 0.3)
    with pytest.raises(ValueError, match="credible"):
        mix_old_features(new, old, credible[:4], 0.3)
    with pytest.raises(ValueError, match="credible"):
        mix_old_features(new, old, credible.long(), 0.3)
    with pytest.raises(ValueError, match="mix_ratio"):
        mix_old_features(new, old, credible, 1.5)


@pytest.mark.gpu
def test_the_same_rows_on_the_gpu():
    new, old = batch()
    credible = torch.rand(16, generator=torch.Generator().manual_seed(0)) < 0.5
    on_cpu = mix_old_features(new, old, credible, 0.3, torch.Generator().manual_seed(7))
    on_gpu = mix_old_features(new.cuda(), old, credible, 0.3, torch.Generator().manual_seed(7))
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), on_cpu)


@pytest.mark.gpu
def test_mixing_never_waits_for_the_gpu():
    new, old = batch()
    new, credible = new.cuda(), torch.ones(16, dtype=torch.bool)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mix_old_features(new, old, credible, 0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
