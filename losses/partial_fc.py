"""Margin softmax over many classes, with class centres sharded over the ranks (Partial FC, arXiv:2203.15565).

Each rank owns a contiguous range of classes. The normalised embeddings and labels of all ranks are gathered, a rank
computes the cosines of the global batch to its own centres only, and from the other ranks the cross-entropy needs just
two numbers per sample: the log-sum-exp over their shard and, if they own the target, its logit. Logits are never
gathered. A rank's centres and their optimiser state are those of its share of the classes, C / R of C on R ranks; its
logits are [R·B, C / R], B·C numbers whatever R: more ranks do not lower them, only `sample_rate` does.

With `sample_rate < 1` a step uses only some of the centres (the positives of the batch and random negatives). Their
gradient is a sparse tensor of those rows, never a dense [num_local, embedding_size] one, and `attach` makes an ordinary
optimiser update those rows and their state only.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from core.distributed import gather, gather_with_grad, rank, rows_of_rank, world_size
from losses.classifier import Classifier
from losses.row_optimizer import RowOptimizer
from losses.sharded import local_labels, sharded_cross_entropy

INIT_STD = 0.01  # of the initial coordinates of the centres
INIT_BLOCK = 1024  # classes per generator of initial centres


class PartialFC(Classifier):
    """Class centres of this rank and the softmax loss over the classes of all ranks.

    margin_loss: a module (cosines [N, C], local labels [N], -1 = elsewhere) -> logits, see `losses.margin`. It must
    tolerate cosines rounded past 1 (by an ulp; with fp16 by 1e-3), as those do: nothing clamps [N, C].
    embedding_size: D. num_classes: over all ranks; shard sizes differ by at most one.
    sample_rate: in (0, 1], the share of its centres that a rank uses per training step; 1 = all, the exact softmax.
    fp16: on CUDA, cosines by a float16 matrix product; normalisation and softmax stay in float32. No effect elsewhere,
    nor with autocast in bfloat16, whose 8 bits would round s · cosine to steps of 0.25: float32 operands then, in TF32
    if `tf32` allows it.
    seed: for the initial centres, which do not depend on the number of ranks, and for the sampling.

    Attributes: `weight`, Parameter [num_local, D]; `class_start`: this rank's classes are class_start ...
    class_start + num_local - 1. The state dict is `weight` alone. Construct it after the process group.
    Raises ValueError if there are more ranks than classes, or if sample_rate is out of range.
    """

    class_sharded = {"weight": 0}

    def __init__(self, margin_loss, embedding_size, num_classes, sample_rate=1.0, fp16=False, seed=0):
        super().__init__()
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate = {sample_rate} must be above 0 and at most 1")
        if world_size() > num_classes:
            raise ValueError(f"{num_classes} classes are fewer than the {world_size()} ranks: start fewer ranks")
        self.margin_loss = margin_loss
        self.embedding_size = embedding_size
        self.num_classes = num_classes
        self.sample_rate = sample_rate
        self.fp16 = fp16
        self.seed = seed
        self.class_start, stop = rows_of_rank(num_classes, rank(), world_size())
        self.num_local = stop - self.class_start
        self.num_sample = max(1, int(sample_rate * self.num_local))
        self.weight = nn.Parameter(_initial_centres(self.class_start, stop, embedding_size, seed))
        self._generator = None

    def extra_repr(self):
        return (
            f"embedding_size={self.embedding_size}, num_classes={self.num_classes}, class_start={self.class_start}, "
            f"num_local={self.num_local}, sample_rate={self.sample_rate:g}, fp16={self.fp16}"
        )

    def forward(self, embeddings, labels):
        """Mean cross-entropy over the global batch: the same scalar on every rank, with exact gradients.

        embeddings: [B, D], any scale, this rank's rows; B must be the same on every rank.
        labels: integers [B] or [B, 1] in [0, num_classes). In training mode with sample_rate < 1 the softmax is over
        the classes sampled by all ranks. Raises ValueError for labels out of range (on CUDA a device-side assert, so
        that the check does not sync).
        """
        labels = labels.reshape(-1).long()
        if embeddings.dim() != 2 or embeddings.shape[1] != self.embedding_size or len(labels) != len(embeddings):
            raise ValueError(
                f"expected embeddings [B, {self.embedding_size}] and labels [B], "
                f"got {tuple(embeddings.shape)} and {tuple(labels.shape)}"
            )
        labels = gather(labels)
        self._check(labels)
        local = local_labels(labels, self.class_start, self.num_local)

        with torch.autocast(self.weight.device.type, enabled=False):
            embeddings = gather_with_grad(F.normalize(embeddings.to(self.weight.dtype)))
            weight = self.weight
            if self.training and self.sample_rate < 1:
                index, local = self._sample(local)
                weight = _SelectRows.apply(weight, index)
            logits = self.margin_loss(self._cosines(embeddings, weight), local)
            return sharded_cross_entropy(logits, local)

    def cosines(self, embeddings):
        """Cosines [N, num_local] of embeddings [N, D], any scale, to all centres of this rank, with gradient to both.

        For losses on class-sharded logits. Nothing is gathered: every rank should pass the same N rows, as returned by
        `gather_with_grad`. float32; rounding may exceed 1 by an ulp (fp16: by 1e-3).
        """
        with torch.autocast(self.weight.device.type, enabled=False):
            return self._cosines(F.normalize(embeddings.to(self.weight.dtype)), self.weight)

    def _cosines(self, embeddings, weight):
        """Cosines of normalised embeddings [N, D] to the (not normalised) rows of `weight`."""
        if self.fp16 and weight.device.type == "cuda" and torch.get_autocast_dtype("cuda") == torch.float16:
            return _HalfCosines.apply(embeddings, weight).float()
        return _Cosines.apply(embeddings, weight)

    def _check(self, labels):
        """Check the global batch's labels [N], so that all ranks fail together and none hangs in a collective."""
        if labels.device.type == "cuda":
            in_range = ((labels >= 0) & (labels < self.num_classes)).all()
            torch._assert_async(in_range, f"PartialFC: a label is outside [0, {self.num_classes})")
        elif len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
            wrong = labels[(labels < 0) | (labels >= self.num_classes)][0].item()
            raise ValueError(
                f"label {wrong} is outside [0, {self.num_classes}): compare num_classes with the training set"
            )

    # --- sampling of centres --------------------------------------------------------------------------------------

    def _sample(self, local):
        """This step's rows of `weight`, int64 [S], sorted, and the local labels [N] as positions in them.

        All positives, filled up with random negatives to num_sample. If the global batch is larger than num_sample, the
        positives may be more: then their number on the CPU; on CUDA, where counting syncs, the batch's size.
        """
        generator = self._sampling_generator()
        score = torch.rand(self.num_local + 1, generator=generator, device=self.weight.device)
        score[local] = 2  # above every random number; -1, a class elsewhere, writes to the extra last entry
        score = score[:-1]
        count = self.num_sample
        if len(local) > count:  # else the positives always fit
            most = min(len(local), self.num_local)  # masking the surplus costs a fifth more time
            count = most if local.is_cuda else max(count, int((score == 2).sum()))
        index = score.topk(count, sorted=False).indices.sort().values
        return index, torch.where(local >= 0, torch.searchsorted(index, local), -1)

    def _sampling_generator(self):
        if self._generator is None or self._generator.device != self.weight.device:
            self._generator = torch.Generator(self.weight.device)
            self._generator.manual_seed(self.seed * 1_000_003 + rank())
        return self._generator

    def sampling_state(self):
        """This rank's sampling state for a checkpoint, a CPU uint8 tensor; None if all centres are used."""
        return self._sampling_generator().get_state() if self.sample_rate < 1 else None

    def set_sampling_state(self, state):
        """Restore what `sampling_state` returned on the same type of device (None: no change)."""
        if state is not None and self.sample_rate < 1:
            self._sampling_generator().set_state(state.cpu())

    def attach(self, optimizer):
        """Make `optimizer`, which must have `weight`, update sampled centres only; call once, before the first step.

        Returns the `RowOptimizer`, or None if sample_rate = 1. Raises ValueError if the optimiser lacks `weight`.
        """
        return RowOptimizer(optimizer, self.weight) if self.sample_rate < 1 else None


def _initial_centres(start, stop, embedding_size, seed):
    """Rows [start, stop) of the N(0, 0.01) matrix of all classes, drawn in blocks so that no rank draws the rest."""
    blocks = []
    for first in range(start // INIT_BLOCK * INIT_BLOCK, stop, INIT_BLOCK):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        block = torch.empty(INIT_BLOCK, embedding_size).normal_(0, INIT_STD, generator=generator)
        blocks.append(block[max(start - first, 0) : stop - first])
    return torch.cat(blocks)


class _Cosines(torch.autograd.Function):
    """F.linear(embeddings, F.normalize(weight)) for normalised embeddings, without a normalised copy of the centres.

    With u = w / |w| and g = dL/du, dL/dw = (g - u (u . g)) / |w|. The factor 1 / |w| is applied to the smaller [N, C].
    """

    @staticmethod
    def forward(ctx, embeddings, weight):
        inverse = _inverse_norm(weight)
        ctx.save_for_backward(embeddings, weight, inverse)
        return (embeddings @ weight.t()).mul_(inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        embeddings, weight, inverse = ctx.saved_tensors
        grad = grad * inverse
        to_embeddings = grad @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_embeddings, None
        to_weight = grad.t() @ embeddings  # g / |w|
        along = torch.linalg.vecdot(weight, to_weight) * inverse**2  # u . g / |w|^2
        return to_embeddings, to_weight.addcmul_(weight, along.unsqueeze(1), value=-1)


class _HalfCosines(torch.autograd.Function):
    """The same by float16 matrix products, with a float16 copy of the normalised centres."""

    @staticmethod
    def forward(ctx, embeddings, weight):
        inverse = _inverse_norm(weight)
        unit = torch.empty_like(weight, dtype=torch.float16)
        torch.mul(weight, inverse.unsqueeze(1), out=unit)  # no float32 copy in between
        embeddings = embeddings.half()
        ctx.save_for_backward(embeddings, unit, inverse)
        return embeddings @ unit.t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        embeddings, unit, inverse = ctx.saved_tensors
        to_embeddings = (grad @ unit).to(inverse.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_embeddings, None
        to_unit = grad.t() @ embeddings
        along = torch.linalg.vecdot(unit, to_unit)
        to_weight = to_unit.to(inverse.dtype).addcmul_(unit, along.unsqueeze(1), value=-1)
        return to_embeddings, to_weight.mul_(inverse.unsqueeze(1))


def _inverse_norm(weight):
    """1 / |w| of every row, clamped as in F.normalize for rows near zero."""
    return torch.linalg.vector_norm(weight, dim=1).clamp_(min=1e-12).reciprocal_()


class _SelectRows(torch.autograd.Function):
    """weight[index], index sorted and unique, with a sparse gradient [num_local, D]."""

    @staticmethod
    def forward(ctx, weight, index):
        ctx.save_for_backward(index)
        ctx.shape = weight.shape
        return weight.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        index = index.unsqueeze(0)
        return torch.sparse_coo_tensor(index, grad, ctx.shape, check_invariants=False, is_coalesced=True), None
