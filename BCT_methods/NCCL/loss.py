"""NCCL's two losses: a new feature must have the same neighbours among the old features as its own old feature.

Shengsen Wu et al., "Neighborhood Consensus Contrastive Learning for Backward-Compatible Representation", AAAI 2022,
arXiv:2108.03372.

Notation: f the new feature of an image, `to_old_width`, g the L2-normalised old one, z, Z the cosines of both, whole,
to all class centres of the new classifier, q_j, Z_j the old features and logits of a first-in, first-out queue, y
labels, T the temperature, P(i) = {j: y_j = y_i}, w_ij = (g_i . q_j + 1) / 2.

    embedding loss = -mean_i 1/|P(i)| sum_{j in P(i)} w_ij log softmax_j(f_i . q_j / T)
    logit loss     = -mean_i 1/|P(i)| sum_{j in P(i)} w_ij log softmax_j(z_i . Z_j / T)
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from core.distributed import gather, rank, rows_of_rank, sum_over_ranks, world_size
from losses.old_width import to_old_width

HALF_BLOCK = 4096  # classes summed in half precision; the sums of these blocks are added in float32


class NeighborhoodConsensusLoss(nn.Module):
    """Both losses, or the embedding loss alone, with their queue of old features.

    width: d_old, of the old features. num_classes: over all ranks; a rank keeps the logits of its own PartialFC shard.
    queue_size: Q, how many of the newest old features are kept. temperature: T > 0 of both softmaxes.
    logit_dtype: of the queue's logits, [Q, num_local]. 8192 x 65,402 in float32 are 2.1 GB on one rank, an eighth of
    that on each of eight. float16 or bfloat16 (for CUDA) halves it; products are then taken in it, summed in float32.
    None: no logits in the queue, no logit loss.

    Buffers, all saved in checkpoints: queue_embeddings [Q, d_old], queue_labels [Q] (-1 = empty slot) and position
    [] (the next slot to fill) are the same on all ranks, queue_logits [Q, num_local] is each rank's own.
    """

    def __init__(self, width, num_classes, queue_size, temperature=1.0, logit_dtype=torch.float32):
        super().__init__()
        if queue_size < 1 or not temperature > 0:
            raise ValueError(f"queue_size = {queue_size} must be at least 1 and temperature = {temperature} above 0")
        start, stop = rows_of_rank(num_classes, rank(), world_size())
        logits = None if logit_dtype is None else torch.zeros(queue_size, stop - start, dtype=logit_dtype)
        self.queue_size = queue_size
        self.temperature = temperature
        self.register_buffer("queue_embeddings", torch.zeros(queue_size, width))
        self.register_buffer("queue_logits", logits)
        self.register_buffer("queue_labels", torch.full((queue_size,), -1, dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        # For resuming on another number of ranks.
        self.class_sharded = {} if logits is None else {"queue_logits": 1}

    def forward(self, old_embeddings, old_logits, new_embeddings, new_logits, labels):
        """Enqueue the old features of the global batch, then compare the new ones with the whole queue.

        old_embeddings [B, d_old], new_embeddings [B, D]: this rank's rows, any scale; B is the same on every rank.
        old_logits, new_logits: [world * B, num_local], cosines of the *global* batch, in rank order, to this rank's
        class centres (one process: [B, C]); the new ones from `gather_with_grad`. None if logit_dtype is.
        labels: int64 [B]; -1 = ignore this image: it does not count in the losses, and its slot stays empty.
        Gradients go to new_embeddings and new_logits only.

        Returns `(embedding_loss, logit_loss)`, scalars of the global batch, the same on all ranks; without logits
        logit_loss is None. An image without a positive in the queue (its own old feature is one, unless the global
        batch is larger than the queue) does not count; if none counts, both are 0. Raises ValueError for mismatched
        shapes.
        """
        self._check(old_embeddings, old_logits, new_embeddings, new_logits, labels)
        dtype = self.queue_embeddings.dtype
        old = F.normalize(old_embeddings.detach().to(dtype))
        new = to_old_width(new_embeddings.to(dtype), self.queue_embeddings.shape[1])
        self.enqueue(gather(old), old_logits, gather(labels))

        positive = (labels[:, None] == self.queue_labels) & (self.queue_labels >= 0)  # [B, Q]
        count = positive.sum(1, keepdim=True)
        weight = (old @ self.queue_embeddings.T + 1) / 2 * positive / count.clamp(min=1)
        scores = [new @ self.queue_embeddings.T]
        if self.queue_logits is not None:
            scores.append(_sum_to_own_rows(_inner_products(new_logits, self.queue_logits, dtype)))

        losses = [self._weighted_cross_entropy(of_one, weight) for of_one in scores]
        *sums, used = sum_over_ranks(torch.stack([*losses, (count > 0).sum().to(dtype)]))
        embedding, *logit = (total / used.detach().clamp(min=1) for total in sums)
        return embedding, logit[0] if logit else None

    def _weighted_cross_entropy(self, scores, weight):
        """-sum_ij weight_ij log softmax_j(scores_ij / T) over filled slots; both [B, Q], weight 0 at empty slots."""
        scores = scores / self.temperature
        # Not -inf: with an empty queue that would give NaN instead of 0.
        filled = scores.masked_fill(self.queue_labels < 0, torch.finfo(scores.dtype).min)
        return (weight.sum(1) * filled.logsumexp(1)).sum() - (weight * scores).sum()

    @torch.no_grad()
    def enqueue(self, embeddings, logits, labels):
        """Overwrite the oldest slots with embeddings [N, d_old], logits [N, num_local] (None if the queue has none) and
        labels [N], the same on all ranks.

        If there are more rows than slots, the last rows are kept. The position stays on the device, so no step waits
        for it.
        """
        rows = len(labels)
        kept = slice(max(rows - self.queue_size, 0), rows)
        slots = (self.position + torch.arange(rows, device=labels.device)[kept]) % self.queue_size
        self.queue_embeddings[slots] = embeddings[kept].to(self.queue_embeddings.dtype)
        if self.queue_logits is not None:
            self.queue_logits[slots] = logits[kept].to(self.queue_logits.dtype)
        self.queue_labels[slots] = labels[kept]
        self.position.add_(rows).remainder_(self.queue_size)

    def _check(self, old_embeddings, old_logits, new_embeddings, new_logits, labels):
        rows = len(labels)
        features = [rows, self.queue_embeddings.shape[1]]
        logits = None if self.queue_logits is None else [rows * world_size(), self.queue_logits.shape[1]]
        wrong = [
            f"{name} {_shape(tensor)} instead of {shape}"
            for name, tensor, shape in (
                ("old_embeddings", old_embeddings, features),
                ("new_embeddings", new_embeddings, [rows, new_embeddings.shape[-1]]),
                ("old_logits", old_logits, logits),
                ("new_logits", new_logits, logits),
            )
            if _shape(tensor) != shape
        ]
        if wrong:
            raise ValueError(f"with labels [{rows}] on each of {world_size()} ranks: {', '.join(wrong)}")


def _shape(tensor):
    return None if tensor is None else list(tensor.shape)


def _inner_products(logits, queue, dtype):
    """logits [N, num_local] x queue [Q, num_local] -> [N, Q] in `dtype`, with gradient to the logits.

    The large operand comes first: a quarter faster on the CPU, the same on a GPU. With a half precision queue, products
    are taken in blocks of classes, since a sum over 65,402 of them reaches several hundred, where float16 is coarse.
    """
    if queue.dtype == dtype:
        return (queue @ logits.to(dtype).T).T
    blocks = zip(logits.to(queue.dtype).split(HALF_BLOCK, dim=1), queue.split(HALF_BLOCK, dim=1))
    return sum((slots @ part.T).to(dtype) for part, slots in blocks).T


class _SumToOwnRows(torch.autograd.Function):
    """Every rank's partial sums [world * B, Q] -> the full sums of this rank's rows [B, Q].

    Only one rank uses a row, so its gradient there is the gradient of every rank's part: the backward gathers the rows.
    """

    @staticmethod
    def forward(ctx, partial):
        partial, rows = partial.detach().contiguous(), len(partial) // world_size()
        if dist.get_backend() == "nccl":
            own = partial.new_empty(rows, partial.shape[1])
            # Its new name in torch 2.14, where the other one warns.
            reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            reduce_scatter(own, partial)
            return own
        total = partial.clone()  # gloo has no reduce-scatter before torch 2.7
        dist.all_reduce(total)
        return total[rank() * rows : (rank() + 1) * rows].clone()

    @staticmethod
    def backward(ctx, grad):
        return gather(grad)


def _sum_to_own_rows(partial):
    return _SumToOwnRows.apply(partial) if world_size() > 1 else partial
