"""Softmax cross-entropy over classes that are sharded over the ranks; logits are never gathered."""

import torch
from torch.autograd.function import once_differentiable

from core.distributed import all_reduce_, gather, rank


def local_labels(labels, start, num_local):
    """Labels [N] as positions among the classes start ... start + num_local - 1; -1 = the class is another rank's."""
    local = labels - start
    return torch.where((local >= 0) & (local < num_local), local, -1)


class ShardedRows:
    """A constant table [C, D] of which each rank holds a shard: the rows start ... start + len(shard) - 1.

    `table[labels]`, labels int64 [B], are the rows [B, D]; all ranks ask together, each for as many labels.
    """

    def __init__(self, shard, start):
        self.shard, self.start, self.dtype = shard, start, shard.dtype

    def to(self, device):
        return ShardedRows(self.shard.to(device), self.start)

    def __getitem__(self, labels):
        local = local_labels(gather(labels), self.start, len(self.shard))
        rows = all_reduce_(torch.where((local >= 0)[:, None], self.shard[local.clamp(min=0)], 0))
        return rows[rank() * len(labels) : (rank() + 1) * len(labels)]


def sharded_cross_entropy(logits, labels):
    """Mean cross-entropy of the global batch, the same on every rank, with exact gradients of this rank's logits.

    logits: [N, C_local], the global batch against this rank's classes. labels: `local_labels`, int64 [N].
    """
    return _ShardedCrossEntropy.apply(logits, labels).mean()


def cross_entropy_of_known(logits, labels):
    """As `sharded_cross_entropy`, without the rows whose label no rank has; 0 if that is all of them."""
    known = all_reduce_((labels >= 0).long()) > 0
    losses = _ShardedCrossEntropy.apply(logits, labels)
    return torch.where(known, losses, 0).sum() / known.sum().clamp(min=1)


class _ShardedCrossEntropy(torch.autograd.Function):
    """-log softmax at the target, [N], of logits [N, C_local] whose classes are sharded over the ranks.

    One pass for the local softmax p and its log-sum-exp, one collective of two numbers per sample; the softmax over all
    ranks is then p * exp(local log-sum-exp - global), a factor that the backward applies in its single pass.
    """

    @staticmethod
    def forward(ctx, logits, labels):
        here = labels >= 0
        column = labels.clamp(min=0).unsqueeze(1)
        probability = logits.softmax(1)
        # From the largest entry, with probability at least 1 / C_local: no overflow, no log of zero.
        log_sum = logits.amax(1) - probability.amax(1).log()
        target = torch.where(here, logits.gather(1, column).squeeze(1), 0)
        parts = gather(torch.stack([log_sum, target])[None])  # [world, 2, N]
        total = parts[:, 0].logsumexp(0)
        ctx.save_for_backward(probability, (log_sum - total).exp(), column, here)
        return total - parts[:, 1].sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        probability, share, column, here = ctx.saved_tensors
        out = probability * (share * grad).unsqueeze(1)
        target = out.gather(1, column) - torch.where(here, grad, 0).unsqueeze(1)
        return out.scatter_(1, column, target), None
