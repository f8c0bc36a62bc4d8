"""Row-wise optimiser steps against the update rules written out row by row."""

import math

import pytest
import torch

from losses.row_optimizer import RowOptimizer

ROWS, SIZE, STEPS = 9, 4, 8


class SlowSGD:
    """Momentum SGD, one row at a time; only rows with a gradient exist for it."""

    def __init__(self, weight, lr, momentum=0.0, weight_decay=0.0, nesterov=False):
        self.weight, self.lr, self.momentum, self.decay, self.nesterov = weight, lr, momentum, weight_decay, nesterov
        self.buffer = torch.zeros_like(weight)

    def step(self, gradients):
        for row, gradient in gradients.items():
            gradient = gradient + self.decay * self.weight[row]
            self.buffer[row] = self.momentum * self.buffer[row] + gradient
            if self.nesterov:
                gradient = gradient + self.momentum * self.buffer[row]
            elif self.momentum:
                gradient = self.buffer[row]
            self.weight[row] -= self.lr * gradient


class SlowAdamW:
    """AdamW, one row at a time; the bias correction counts the steps of all."""

    def __init__(self, weight, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False):
        self.weight, self.lr, self.betas, self.eps = weight, lr, betas, eps
        self.decay, self.amsgrad = weight_decay, amsgrad
        self.first, self.second, self.largest = (torch.zeros_like(weight) for _ in range(3))
        self.count = 0

    def step(self, gradients):
        self.count += 1
        for row, gradient in gradients.items():
            self.weight[row] *= 1 - self.lr * self.decay
            self.first[row] = self.betas[0] * self.first[row] + (1 - self.betas[0]) * gradient
            self.second[row] = self.betas[1] * self.second[row] + (1 - self.betas[1]) * gradient**2
            self.largest[row] = torch.maximum(self.largest[row], self.second[row])
            second = self.largest[row] if self.amsgrad else self.second[row]
            second = second / (1 - self.betas[1] ** self.count)
            first = self.first[row] / (1 - self.betas[0] ** self.count)
            self.weight[row] -= self.lr * first / (second.sqrt() + self.eps)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, SlowSGD, dict(lr=0.1, momentum=0.9, weight_decay=0.05)),
    "sgd plain": (torch.optim.SGD, SlowSGD, dict(lr=0.1)),
    "sgd nesterov": (torch.optim.SGD, SlowSGD, dict(lr=0.1, momentum=0.8, nesterov=True)),
    "adamw": (torch.optim.AdamW, SlowAdamW, dict(lr=0.01, weight_decay=0.3)),
    "adamw amsgrad": (torch.optim.AdamW, SlowAdamW, dict(lr=0.01, weight_decay=0.1, amsgrad=True)),
}
IMPLEMENTATIONS = [dict(foreach=False), dict(foreach=True), dict(fused=True)]


def drawn(step):
    """Some rows and their gradients; the last three rows come late, so that their state is created late."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randperm(ROWS if step > 3 else 6, generator=generator)[:3].sort().values
    return rows, torch.randn(3, SIZE, dtype=torch.float64, generator=generator)


def sparse(rows, values):
    return torch.sparse_coo_tensor(rows[None], values.clone(), (ROWS, SIZE), check_invariants=True)


def start(make, options):
    """A parameter beside another one, like centres beside a backbone, in an attached optimiser."""
    generator = torch.Generator().manual_seed(99)
    weight = torch.nn.Parameter(torch.randn(ROWS, SIZE, dtype=torch.float64, generator=generator))
    other = torch.nn.Parameter(torch.randn(5, dtype=torch.float64, generator=generator))
    optimizer = make([{"params": [other]}, {"params": [weight]}], **options)
    RowOptimizer(optimizer, weight)
    return weight, other, optimizer


def tables(optimizer, weight):
    return {
        key: value.clone()
        for key, value in optimizer.state.get(weight, {}).items()
        if torch.is_tensor(value) and value.dim() == 2
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_and_state_equal_a_row_by_row_optimiser(name, implementation):
    make, slow, options = OPTIMIZERS[name]
    weight, other, optimizer = start(make, {**options, **implementation})
    expected = slow(weight.detach().clone(), **options)
    expected_other = slow(other.detach().clone()[None], **options)  # as one row, touched by every step
    for step in range(STEPS):
        rows, values = drawn(step)
        before, state = weight.detach().clone(), tables(optimizer, weight)
        weight.grad, other.grad = sparse(rows, values), torch.full((5,), 0.1 * step, dtype=torch.float64)
        optimizer.step()
        optimizer.zero_grad()

        expected.step(dict(zip(rows.tolist(), values)))
        expected_other.step({0: torch.full((5,), 0.1 * step, dtype=torch.float64)})
        torch.testing.assert_close(weight.detach(), expected.weight, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other.detach(), expected_other.weight[0], rtol=1e-9, atol=1e-9)
        untouched = [row for row in range(ROWS) if row not in rows]
        assert torch.equal(weight[untouched], before[untouched])
        for key, value in state.items():
            assert torch.equal(optimizer.state[weight][key][untouched], value[untouched])
    names = {"momentum_buffer": "buffer", "exp_avg": "first", "exp_avg_sq": "second"}
    for key, value in tables(optimizer, weight).items():
        if key in names:
            torch.testing.assert_close(value, getattr(expected, names[key]), rtol=1e-9, atol=1e-9)
    assert optimizer.param_groups[0]["params"][0] is other and optimizer.param_groups[1]["params"][0] is weight


@pytest.mark.parametrize("unscale_first", [True, False])
@pytest.mark.parametrize("implementation", [dict(foreach=False), dict(fused=True)], ids=str)
def test_gradient_scaler_scales_back_and_skips(implementation, unscale_first):
    weight, _, optimizer = start(torch.optim.SGD, dict(lr=0.1, momentum=0.9, **implementation))
    plain, _, plain_optimizer = start(torch.optim.SGD, dict(lr=0.1, momentum=0.9))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        rows, values = drawn(step)
        if step == 2:
            values[1, 1] = math.inf
        else:
            plain.grad = sparse(rows, values)
            plain_optimizer.step()
        before = weight.detach().clone()
        loss = (torch.nn.functional.embedding(rows, weight, sparse=True) * values).sum()
        scaler.scale(loss).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 2:
            assert torch.equal(weight, before)
        torch.testing.assert_close(weight.detach(), plain.detach(), rtol=1e-9, atol=1e-9)
    assert scaler.get_scale() == 2.0**9


def test_a_dense_gradient_steps_every_row():
    weight, _, optimizer = start(torch.optim.SGD, dict(lr=0.5))
    before = weight.detach().clone()
    weight.grad = torch.ones(ROWS, SIZE, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 0.5)


def test_without_a_gradient_nothing_changes():
    weight, _, optimizer = start(torch.optim.AdamW, dict(lr=0.5, weight_decay=0.1))
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before) and weight not in optimizer.state


def test_misuse_is_refused():
    weight, _, optimizer = start(torch.optim.SGD, dict(lr=0.5))
    with pytest.raises(ValueError, match="does not have"):
        RowOptimizer(optimizer, torch.nn.Parameter(torch.zeros(2, 2)))
    before = weight.detach().clone()
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        weight.grad = sparse(*drawn(0))
        with pytest.raises(RuntimeError, match="closure"):
            call()
    assert torch.equal(weight, before) and optimizer.param_groups[1]["params"][0] is weight
