"""Learning-rate schedule: a factor on the base rate for every optimiser step."""

from torch.optim.lr_scheduler import LambdaLR


def learning_rate_factor(step, steps_per_epoch, num_epoch, warmup_epoch=0.0, decay_epoch=()):
    """Factor on the base learning rate for `step`, counted from 0.

    Linear from 0 over the first `warmup_epoch` epochs; the first warm-up step has factor 1/warm-up steps. Then either
    ×0.1 at the begin of every epoch in `decay_epoch`, or, where that is empty, polynomial decay of power 2 over
    the remaining steps, down to 0 after the last one: (1 − t/T)².

    warmup_epoch = −1, as published BCT configs have it: the decay begins as if one epoch of it were already over. At
    the fractional epoch e = step / steps_per_epoch of E the factor is ((E − e)/(E + 1))²; with `decay_epoch` as for 0.
    """
    warmup_steps = int(warmup_epoch * steps_per_epoch)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay_epoch:
        return 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in decay_epoch)
    total = num_epoch * steps_per_epoch - warmup_steps
    return max(0.0, 1 - (step - warmup_steps) / max(total, 1)) ** 2


def make_schedule(optimizer, cfg, steps_per_epoch):
    """LambdaLR over `learning_rate_factor`; call `.step()` once per optimiser step."""
    return LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, steps_per_epoch, cfg.num_epoch, cfg.warmup_epoch, cfg.decay_epoch),
    )


def set_step(schedule, step):
    """Put a LambdaLR where it is after `step` steps, with the rates that the optimiser then has."""
    schedule.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
    for group, rate in zip(schedule.optimizer.param_groups, rates):
        group["lr"] = rate
    schedule._last_lr = rates
