"""What a classifier owes the trainer, its checkpoints and a resume on another number of ranks."""

import torch.nn.functional as F
from torch import nn

from core.distributed import global_mean


class Classifier(nn.Module):
    """Base of what turns embeddings and labels into the classification loss; `Trainer.build_classifier` returns one.

    A method calls `forward` in its `losses`; like every term, what it returns is a scalar of the *global* batch
    (core/distributed.py). A subclass without shards and sampling needs no more than that. Its parameters train, and
    they and its buffers are in every checkpoint and in softmax_fc_gpu_{rank}.pt, but not in model.pt.
    """

    # {name: dim} of the parameters and buffers of which a rank holds its classes only, along dim, as `rows_of_rank`
    # deals them out. They stay each rank's own, and are resharded for another number of ranks, with the optimiser state
    # of their shape. All other parameters are replicated: rank 0's at the start, gradients summed over the ranks.
    # Modules in a trainer's `extra` declare theirs in the same way.
    class_sharded = {}

    def attach(self, optimizer):
        """Called once, with the run's optimiser, before the first step."""

    def sampling_state(self):
        """This rank's random state for a checkpoint (tensors and plain values), or None without one."""

    def set_sampling_state(self, state):
        """Continue from what `sampling_state` returned; None (a rank that is new on a resume): no change."""


class Softmax(Classifier):
    """Plain softmax over the logits of a network that has its own head: no parameters here.

    forward(logits [B, C], labels int64 [B]) -> mean cross-entropy over the global batch.
    """

    def forward(self, logits, labels):
        return global_mean(F.cross_entropy(logits, labels))


def sharded_tensors(module):
    """`[(name in the state dict, tensor, dim)]` of what the parts of `module` declare as `class_sharded`.

    Raises AttributeError for a declared name that a part does not have.
    """
    return [
        (f"{prefix}.{name}" if prefix else name, getattr(part, name), dim)
        for prefix, part in module.named_modules()
        for name, dim in getattr(part, "class_sharded", {}).items()
    ]


def replicated_parameters(module):
    sharded = {id(tensor) for _, tensor, _ in sharded_tensors(module)}
    return [parameter for parameter in module.parameters() if id(parameter) not in sharded]
