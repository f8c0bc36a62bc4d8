"""A checkpoint of some ranks made into one of another number of ranks.

What a rank holds of the classes (its shard of the class centres, their optimiser state, a method's buffers over
classes) is cut anew from all shards; what all ranks hold alike is taken as it is.
"""

import torch

from engine.distributed import rows_of_rank


def class_sharded(classifier, extra, optimizer):
    """`[(path, dim)]`: which tensors of a state dict are shards over the classes, and along which dimension.

    A path is a tuple of keys into the whole state, such as ("optimizer", "state", 7, "momentum_buffer"). The
    classifier's parameters are such along dim 0, with every optimiser state of their shape; of `extra`, the buffers
    that a module names in its attribute `class_sharded`, {name: dim}.
    """
    paths = []
    for prefix, module in extra.named_modules():
        for name, dim in getattr(module, "class_sharded", {}).items():
            paths.append((("extra", f"{prefix}.{name}"), dim))
    if classifier is None:
        return paths
    paths += [(("classifier", name), 0) for name, _ in classifier.named_parameters()]
    shards = {id(parameter) for parameter in classifier.parameters()}
    number = 0      # of a parameter in the optimiser's state dict: counted through its groups
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items() if id(parameter) in shards else ():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    paths.append((("optimizer", "state", number, key), 0))
            number += 1
    return paths


def recut(states, rank, world_size):
    """The state of `rank` of `world_size`, from the `states` of all ranks of another world size, in order.

    A rank beyond the old ones gets an old rank's BatchNorm statistics, and no random state of its own: it keeps the
    generators that it was seeded with. Nothing of `states` is changed; files may be memory-mapped.
    """
    state = states[rank % len(states)]
    if rank >= len(states):
        state = {**state, "random": None, "sampler": None}
    for path, dim in state["class_sharded"]:
        shards = [_look_up(one, path) for one in states]
        state = _replaced(state, path, _cut(shards, dim, rank, world_size))
    return state


def _cut(shards, dim, rank, world_size):
    """The part of the concatenated shards that is this rank's; reads no more of them than that."""
    start, stop = rows_of_rank(sum(shard.shape[dim] for shard in shards), rank, world_size)
    parts, first = [shards[0].narrow(dim, 0, 0)], 0     # with fewer classes than ranks some get none
    for shard in shards:
        last = first + shard.shape[dim]
        low, high = max(start, first), min(stop, last)
        if low < high:
            parts.append(shard.narrow(dim, low - first, high - low))
        first = last
    return torch.cat(parts, dim)


def _look_up(state, path):
    for key in path:
        state = state[key]
    return state


def _replaced(state, path, value):
    """A copy of the nested dicts with `value` at `path`."""
    key, *rest = path
    return {**state, key: _replaced(state[key], rest, value) if rest else value}
