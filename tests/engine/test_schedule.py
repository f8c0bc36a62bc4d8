import pytest
import torch
from easydict import EasyDict

from engine.schedule import learning_rate_factor, make_schedule


def test_polynomial_after_warm_up():
    factors = [learning_rate_factor(step, 10, 5, warmup_epoch=0.4) for step in range(50)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == [pytest.approx((1 - step / 46) ** 2) for step in range(46)]
    assert learning_rate_factor(50, 10, 5, warmup_epoch=0.4) == 0


def test_steps_at_decay_epochs():
    factors = [learning_rate_factor(step, 2, 6, decay_epoch=[2, 4]) for step in range(12)]
    assert factors == [1] * 4 + [pytest.approx(0.1)] * 4 + [pytest.approx(0.01)] * 4


def test_the_optimiser_sees_the_factor_of_each_step():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    schedule = make_schedule(optimizer, EasyDict(num_epoch=2, warmup_epoch=0.5, decay_epoch=[]), steps_per_epoch=4)
    seen = []
    for _ in range(8):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == [pytest.approx(0.5 * learning_rate_factor(step, 4, 2, 0.5)) for step in range(8)]
