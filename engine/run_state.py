"""The whole state of a training run on one rank, for a checkpoint, and a run that goes on from it.

A checkpoint holds what training has made. What a config says (learning rate, weight decay, number of epochs, ...) comes
from the config of the run that goes on, so that it can be changed; differences are logged.
"""

import torch

from engine.build import unwrap
from engine.checkpoint import CheckpointError
from engine.distributed import all_reduce_
from engine.monitor import log
from engine.random_state import random_state, set_random_state
from engine.recut import class_sharded
from engine.schedule import set_step

# Another value of these makes another run of it.
SAME_RUN = ("network", "embedding_size", "num_classes", "num_image", "optimizer", "sample_rate", "seed")
# Of these a difference means nothing.
NOT_TOLD = ("resume", "config_file", "name", "workspace", "batch_size", "gradient_acc")


def state_of(run):
    """The whole state of this rank of the Trainer `run`, of tensors and plain values only."""
    classifier = run.classifier
    return {
        "epoch": run.epoch,
        "step": run.step,
        "total_steps": run.total_steps,
        "steps_per_epoch": run.steps_per_epoch,
        "world_size": run.world_size,
        "global_batch": run.global_batch,
        "method": type(run).__name__,
        "config": {key: value for key, value in run.cfg.items() if _is_plain(value)},
        "best": dict(run.best),
        "backbone": unwrap(run.backbone).state_dict(),
        "classifier": classifier.state_dict() if classifier is not None else {},
        "extra": run.extra.state_dict(),
        "class_sharded": class_sharded(classifier, run.extra, run.optimizer),
        "sampler": classifier.generator_state() if classifier is not None else None,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "skipped": None if run.scaler.skipped is None else int(run.scaler.skipped),
        "random": random_state(run.generator, run.device),
    }


def restore(run, state, path):
    """Put the Trainer `run` where the checkpoint `state`, read from the file `path`, was written.

    Raises CheckpointError for the checkpoint of another run.
    """
    _check_same_run(run, state, path)
    try:
        unwrap(run.backbone).load_state_dict(state["backbone"])
        if run.classifier is not None:
            run.classifier.load_state_dict(state["classifier"])
            run.classifier.set_generator_state(state["sampler"])
        run.extra.load_state_dict(state["extra"])
        _load_optimizer(run.optimizer, state["optimizer"])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = str(error).replace("\n", " ")[:300]
        raise CheckpointError(f"{path}: does not fit this run ({reason}); choose another `output`") from error
    if run.scaler.is_enabled() and state["scaler"]:     # empty: written with another amp_dtype
        run.scaler.load_state_dict(state["scaler"])
        run.scaler.skipped = None if state["skipped"] is None else torch.tensor(state["skipped"], device=run.device)
    if state["random"] is not None:
        set_random_state(state["random"], run.generator, run.device)
    run.best = dict(state["best"])
    run.epoch, run.step = _position(run, state)
    set_step(run.schedule, run.step)
    _tell_differences(run, state)


def named_tensors(run):
    """`(name, tensor)` of the parameters and floating-point buffers of this rank."""
    modules = {"backbone": unwrap(run.backbone), "classifier": run.classifier, "extra": run.extra}
    for prefix, module in modules.items():
        if module is not None:
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if tensor.is_floating_point():
                    yield f"{prefix}.{name}", tensor


def refuse_broken_weights(run):
    """Raise CheckpointError, on all ranks, where weights or statistics of any rank are NaN or infinite."""
    tensors = dict(named_tensors(run))
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()])
    everywhere = all_reduce_(finite.all().int(), torch.distributed.ReduceOp.MIN)
    if not everywhere:
        broken = [name for name, good in zip(tensors, finite.tolist()) if not good]
        raise CheckpointError(
            f"step {run.step}: NaN or infinity in {', '.join(broken[:5]) or 'another rank'}"
            f"{f' and {len(broken) - 5} more' if len(broken) > 5 else ''}; nothing saved. Lower lr or add "
            f"warmup_epoch, and go on with --resume True from what checkpoints {run.cfg.output} has, or start again"
        )


def _is_plain(value):
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _check_same_run(run, state, path):
    for key in SAME_RUN:
        if state["config"][key] != run.cfg[key]:
            raise CheckpointError(
                f"{path}: written with {key} = {state['config'][key]!r}, this run has {run.cfg[key]!r}; "
                f"set {key} back to go on from it, or choose another `output`"
            )
    if state["global_batch"] == run.global_batch:
        return
    if state["world_size"] == run.world_size:
        before, now = ([c["batch_size"], c["gradient_acc"]] for c in (state["config"], run.cfg))
        raise CheckpointError(
            f"{path}: written with batch_size = {before[0]} and gradient_acc = {before[1]}, this run has {now[0]} "
            f"and {now[1]}; set batch_size back to go on from it, or choose another `output`"
        )
    log.warning(
        "%s: written by %d ranks with a global batch of %d images, this run of %d ranks has %d; lr stays as the config "
        "says. For the same steps, choose batch_size and gradient_acc so that ranks x batch_size x gradient_acc is %d",
        path, state["world_size"], state["global_batch"], run.world_size, run.global_batch, state["global_batch"],
    )


def _load_optimizer(optimizer, state):
    """Momentum and the like from the checkpoint; learning rate, weight decay and the like stay the config's."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    # Before it is loaded: a setting says where some of the state has to lie.
    groups = [{**group, **setting} for group, setting in zip(state["param_groups"], settings)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, its in optimizer.state.items():
        for key, value in its.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                its[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)  # channels_last has changed


def _position(run, state):
    """`(epoch, step)`: the same image of the same epoch, whatever a step now takes; rounded up to a whole step."""
    epoch = state["epoch"]
    done = (state["step"] - epoch * state["steps_per_epoch"]) * state["global_batch"]
    done = min(-(-done // run.global_batch), run.steps_per_epoch)
    return epoch, epoch * run.steps_per_epoch + done


def _tell_differences(run, state):
    if state.get("method", type(run).__name__) != type(run).__name__:
        log.warning("the checkpoint was written by %s, this run is of %s", state["method"], type(run).__name__)
    for key, now in run.cfg.items():
        before = state["config"].get(key, now)
        if key not in NOT_TOLD and before != now and not (isinstance(now, (list, tuple)) and list(before) == list(now)):
            log.info("changed since the checkpoint: %s was %r, is %r", key, before, now)
