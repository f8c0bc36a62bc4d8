"""What the networks share: precision, the embedding's end, the softmax head, activation checkpointing."""

import contextlib

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def half_precision(x, enabled):
    """Context in which convolutions and products run in half precision, if `enabled` and `x` is on a GPU.

    The type is torch's default for autocast on CUDA: float16, unless the training set another (`amp_dtype`).

    On the CPU everything stays in float32: half precision there is slower, and old and new features that were
    computed on different machines stay comparable to the last digits.
    """
    if enabled and x.device.type == "cuda":
        return torch.autocast("cuda")
    return contextlib.nullcontext()


def full_precision(x):
    """Context that switches autocast off on the device of `x`, for the parts that must run in float32."""
    if x.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


class FixedScaleBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d whose weight stays 1 and takes no gradient: [B, D] -> [B, D].

    The last layer of ArcFace's networks (arXiv:1801.07698, "option E"): embeddings with a learnt bias, no learnt scale.
    """

    def __init__(self, num_features):
        super().__init__(num_features, eps=1e-5)
        nn.init.ones_(self.weight)
        self.weight.requires_grad = False


class SoftmaxHead(nn.Module):
    """Mixin of a network that can be trained with a plain softmax: subclasses define `embed(images)`.

    With `num_classes` the network owns `cls_fc`, a linear layer with bias; in training the forward returns class
    logits [B, num_classes], in evaluation the embedding [B, num_features]. Without, always the embedding.
    """

    def add_head(self, num_classes):
        self.num_classes = num_classes
        if num_classes is not None:
            self.cls_fc = nn.Linear(self.num_features, num_classes)

    def forward(self, images):
        embedding = self.embed(images)
        if self.training and self.num_classes is not None:
            with full_precision(embedding):
                return self.cls_fc(embedding)
        return embedding


@contextlib.contextmanager
def _statistics_kept(module):
    """Let BatchNorm normalise by the batch without touching its running statistics."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept):
            norm.momentum, norm.num_batches_tracked = momentum, count


def checkpointed(module, x):
    """`module(x)`; where gradients are recorded its activations are dropped and computed again in the backward pass.

    The second forward leaves BatchNorm's running statistics alone, so that a step with checkpointing changes the
    same state by the same amounts as one without.
    """
    if not torch.is_grad_enabled():
        return module(x)
    return checkpoint(
        module, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(module))
    )
