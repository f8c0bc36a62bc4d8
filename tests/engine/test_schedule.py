import pytest
import torch
from easydict import EasyDict

from core.config import ConfigError, load_config
from engine.schedule import learning_rate_factor, make_schedule


def test_polynomial_after_warm_up():
    factors = [learning_rate_factor(step, 10, 5, warmup_epoch=0.4) for step in range(50)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == [pytest.approx((1 - step / 46) ** 2) for step in range(46)]
    assert learning_rate_factor(50, 10, 5, warmup_epoch=0.4) == 0


def test_steps_at_decay_epochs():
    factors = [learning_rate_factor(step, 2, 6, decay_epoch=[2, 4]) for step in range(12)]
    assert factors == [1] * 4 + [pytest.approx(0.1)] * 4 + [pytest.approx(0.01)] * 4


def test_warm_up_of_minus_one_decays_one_epoch_ahead():
    """((E − e)/(E + 1))² at the fractional epoch e."""
    epochs, a_epoch = 5, 7
    factors = [learning_rate_factor(step, a_epoch, epochs, warmup_epoch=-1) for step in range(epochs * a_epoch + 1)]
    plain = [
        ((epochs - (epoch + done / a_epoch)) / (epochs + 1)) ** 2 for epoch in range(epochs) for done in range(a_epoch)
    ]
    assert factors == [*map(pytest.approx, plain), 0]
    assert factors[0] == pytest.approx((5 / 6) ** 2)


def test_warm_up_of_minus_one_leaves_decay_epochs_as_they_are():
    for step in range(12):
        assert learning_rate_factor(step, 2, 6, -1, [2, 4]) == learning_rate_factor(step, 2, 6, 0, [2, 4])


@pytest.mark.parametrize("value", ["-0.5", "-2", "-1.5"])
def test_other_negative_warm_ups_are_refused(value):
    path = "BCT_methods/BCT/configs/OPclass_ms1mv3_r18_to_r50_BCT_softmax_to_arc_f128.py"
    assert load_config(path).warmup_epoch == -1
    with pytest.raises(ConfigError, match=rf"{path}: warmup_epoch = {value}.*; it must be at least 0, or -1"):
        load_config(path, ["--warmup_epoch", value])


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
