"""The loss scaler of float16 training, for fused optimisers and class shards that differ between ranks."""

import torch
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler


class _CountsSkippedSteps:
    """Over torch's scalers: one verdict for all ranks that fused kernels understand, and a count of skipped steps.

    `skipped` is a 0-d tensor on the device, so that counting never makes the host wait.
    """

    skipped = None

    def unscale_(self, optimizer):
        super().unscale_(optimizer)
        if not self.is_enabled():
            return
        verdicts = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
        for found_inf in verdicts:
            # The sharded scaler adds the ranks' verdicts up, and a fused kernel skips the step at exactly 1.
            found_inf.clamp_(max=1)
        overflow = torch.stack([found_inf.reshape(()) for found_inf in verdicts]).amax()
        self.skipped = overflow if self.skipped is None else self.skipped + overflow


class _Scaler(_CountsSkippedSteps, torch.amp.GradScaler):
    pass


class _ShardedScaler(_CountsSkippedSteps, ShardedGradScaler):
    pass


def make_scaler(device, world_size, enabled):
    """A GradScaler for `device`; with several ranks all skip a step in which any one's gradients overflow.

    Class shards are each rank's own, so one rank alone can overflow; were it to skip alone, the ranks would part.
    """
    make = _ShardedScaler if world_size > 1 else _Scaler
    return make(device=device.type, enabled=enabled, growth_interval=100)


def start_momentum(optimizer):
    """Give every parameter of an SGD with momentum a buffer of zeros, which is what the first step assumes anyway.

    Fused SGD allocates the buffers, uninitialised, in its first step, and leaves them so if the scaler skips that step.
    """
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
