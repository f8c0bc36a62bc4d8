"""The interface of a classifier to the trainer, to checkpoints and to a resume on another number of ranks."""

import torch.nn.functional as F
from torch import nn

from core.distributed import global_mean


class Classifier(nn.Module):
    """Base class: embeddings and labels -> classification loss; `Trainer.build_classifier` returns one.

    A method calls `forward` in its `losses`; like every term it returns a scalar of the *global* batch
    (core/distributed.py). A subclass without shards and sampling needs nothing else. Its parameters are trained; they
    and its buffers are saved in checkpoints and in softmax_fc_gpu_{rank}.pt, not in model.pt.
    """

    # {name: dim} of parameters and buffers that are sharded by class along dim, as in `rows_of_rank`. Each rank keeps
    # its own shard; a resume on another number of ranks reshards it, with the optimiser state of its shape. All other
    # parameters are replicated: rank 0's at the start, gradients summed over the ranks. Modules in a trainer's `extra`
    # declare theirs in the same way.
    class_sharded = {}

    def attach(self, optimizer):
        """Called once with the run's optimiser, before the first step."""

    def sampling_state(self):
        """This rank's random state for a checkpoint (tensors and plain values), or None."""

    def set_sampling_state(self, state):
        """Restore what `sampling_state` returned; None (a rank that is new in a resumed run): no change."""


class Softmax(Classifier):
    """Plain softmax over the logits of a network with its own head; no parameters.

    forward(logits [B, C], labels int64 [B]) -> mean cross-entropy over the global batch.
    """

    def forward(self, logits, labels):
        return global_mean(F.cross_entropy(logits, labels))


def sharded_tensors(module):
    """`[(name in the state dict, tensor, dim)]` of all tensors that submodules declare as `class_sharded`.

    Raises AttributeError for a declared name that does not exist.
    """
    return [
        (f"{prefix}.{name}" if prefix else name, getattr(part, name), dim)
        for prefix, part in module.named_modules()
        for name, dim in getattr(part, "class_sharded", {}).items()
    ]


def replicated_parameters(module):
    sharded = {id(tensor) for _, tensor, _ in sharded_tensors(module)}
    return [parameter for parameter in module.parameters() if id(parameter) not in sharded]
