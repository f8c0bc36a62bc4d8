"""AdvBCT's adversary: it learns to tell new features from old ones, and the new model learns to fool it.

Tan Pan et al., CVPR 2023, arXiv:2305.02610; gradient reversal: Ganin and Lempitsky, ICML 2015, arXiv:1409.7495.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from core.distributed import gather, gather_with_grad, mean_of_counted, rank
from losses.old_width import to_old_width, with_width

HIDDEN = 100
NEW, OLD = 0, 1  # the adversary's two labels


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.alpha * grad, None


def reverse_gradient(x, alpha):
    """Identity in the forward pass; the gradient is multiplied by -alpha."""
    return _ReverseGradient.apply(x, alpha)


def reversal_strength(progress):
    """alpha = 2 / (1 + exp(-10 p)) - 1 for the fraction p of the training done, in [0, 1]: from 0 to almost 1."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


class Discriminator(nn.Module):
    """linear(D, 100) - BatchNorm - ReLU - linear(100, 2) - log-softmax.

    In training BatchNorm uses the statistics of the global batch, with gradient, so the number of ranks makes no
    difference.
    """

    def __init__(self, width):
        super().__init__()
        self.hidden = nn.Linear(width, HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.out = nn.Linear(HIDDEN, 2)

    def forward(self, features, counted):
        """Features [B, D] -> log-probabilities [B, 2] of NEW and OLD; B is the same on every rank.

        counted: bool [B], the rows whose statistics normalise in training; the other rows' outputs mean nothing.
        """
        hidden, first = self.hidden(features), rank() * len(features)
        if self.training:
            hidden = self._normalised(gather_with_grad(hidden), gather(counted))[first : first + len(features)]
        else:
            hidden = self.norm(hidden)
        return self.out(F.relu(hidden)).log_softmax(1)

    def _normalised(self, hidden, counted):
        """BatchNorm of hidden [N, 100] with the statistics of the rows that count, on which the host need not wait.

        The running statistics, which training does not use, are those of all rows.
        """
        weight = (counted.to(hidden.dtype) / counted.sum().clamp(min=1))[:, None]
        mean = (weight * hidden).sum(0)
        variance = (weight * (hidden - mean).square()).sum(0)
        of_counted = (hidden - mean) * (variance + self.norm.eps).rsqrt() * self.norm.weight + self.norm.bias
        return torch.where(counted.all(), self.norm(hidden), of_counted)


def adversarial_loss(discriminator, new, old, alpha, normalize_input=True):
    """NLL of the new features as NEW + NLL of the old ones as OLD, each a mean over the global batch.

    Images without an old feature, rows of zeros, do not count on either side.

    new [B, D], of any width, old [B, d_old]: this rank's rows, any scale; new ones go in as `to_old_width`.
    normalize_input: L2-normalise both here. The discriminator gets the
    plain gradient, `new` the reversed one, scaled by alpha, `old` none. New and old features go through the
    discriminator separately, each with its own BatchNorm statistics.
    """
    dtype = discriminator.hidden.weight.dtype
    new, old = new.to(dtype), old.detach().to(dtype)
    if normalize_input:
        new, old = to_old_width(new, old.shape[1]), F.normalize(old)
    else:
        new = with_width(new, old.shape[1])
    counted = old.any(dim=1)
    said_of_new = discriminator(reverse_gradient(new, alpha), counted)[:, NEW]
    said_of_old = discriminator(old, counted)[:, OLD]
    totals = [torch.where(counted, -said, 0).sum() for said in (said_of_new, said_of_old)]
    return mean_of_counted(torch.stack(totals), counted.sum())
