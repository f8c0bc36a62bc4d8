"""Learning-rate schedule: a factor on the base learning rate at every optimiser step."""

from torch.optim.lr_scheduler import LambdaLR

from core.errors import warn


def learning_rate_factor(step, steps_per_epoch, num_epoch, warmup_epoch=0.0, decay_epoch=()):
    """Factor on the base learning rate for `step`, counted from 0.

    Linear from 0 over the first `warmup_epoch` epochs; the first warm-up step has factor 1/warm-up steps. Then ×0.1 at
    the start of every epoch in `decay_epoch` or, if that is empty, polynomial decay of power 2 over the remaining
    steps, to 0 after the last one: (1 − t/T)².

    warmup_epoch = −1, as in published BCT configs, starts the decay one epoch ahead: at the fractional epoch
    e = step / steps_per_epoch of E the factor is ((E − e)/(E + 1))². With `decay_epoch` it means 0.
    """
    warmup_steps = int(warmup_epoch * steps_per_epoch)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay_epoch:
        return 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in decay_epoch)
    total = num_epoch * steps_per_epoch - warmup_steps
    return max(0.0, 1 - (step - warmup_steps) / max(total, 1)) ** 2


def make_schedule(optimizer, cfg, steps_per_epoch):
    """LambdaLR of `learning_rate_factor`; call `.step()` once per optimiser step."""
    warn_of_unreached(cfg, "warmup_epoch", [cfg.warmup_epoch])
    warn_of_unreached(cfg, "decay_epoch", cfg.decay_epoch)
    return LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, steps_per_epoch, cfg.num_epoch, cfg.warmup_epoch, cfg.decay_epoch),
    )


def warn_of_unreached(cfg, key, epochs):
    """Log the `epochs`, of the config's `key`, that the run never reaches."""
    late = [f"{epoch:g}" for epoch in epochs if epoch >= cfg.num_epoch]
    if late:
        warn("%s: %s %s is never reached with num_epoch = %d", cfg.config_file, key, ", ".join(late), cfg.num_epoch)


def set_step(schedule, step):
    """Set a LambdaLR, and its optimiser's rates, to their state after `step` steps."""
    schedule.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
    for group, rate in zip(schedule.optimizer.param_groups, rates):
        group["lr"] = rate
    schedule._last_lr = rates
