"""Shared by the networks: precision, the last BatchNorm, the softmax head, activation checkpointing."""

import contextlib

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def half_precision(x, enabled):
    """Context for convolutions and matrix products in half precision, if `enabled` and `x` is on a GPU.

    The dtype is torch's default for CUDA autocast: float16, unless the training set another (`amp_dtype`). The CPU
    stays in float32: half precision is slower there, and features from different machines stay comparable to the last
    digits.
    """
    if enabled and x.device.type == "cuda":
        return torch.autocast("cuda")
    return contextlib.nullcontext()


def full_precision(x):
    """Context without autocast on the device of `x`, for parts that must run in float32."""
    if x.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


class FixedScaleBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d with weight fixed at 1: [B, D] -> [B, D].

    The last layer of ArcFace's networks (arXiv:1801.07698, "option E"): embeddings with a learnt bias, no learnt scale.
    """

    def __init__(self, num_features):
        super().__init__(num_features, eps=1e-5)
        nn.init.ones_(self.weight)
        self.weight.requires_grad = False


class SoftmaxHead(nn.Module):
    """Mixin for networks that can train with a plain softmax; subclasses define `embed(images)`.

    With `num_classes` the network has `cls_fc`, a linear layer with bias; forward returns class logits
    [B, num_classes] in training mode, the embedding [B, num_features] in eval mode. Without, always the embedding.
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
    """BatchNorm normalises by the batch but leaves its running statistics unchanged."""
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
    """`module(x)`; under autograd, its activations are dropped and recomputed in the backward pass.

    The second forward leaves BatchNorm's running statistics unchanged, so a step with checkpointing equals one without.
    """
    if not torch.is_grad_enabled():
        return module(x)
    return checkpoint(
        module, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(module))
    )
