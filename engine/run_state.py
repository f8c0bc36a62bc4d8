"""The state of a training run on one rank: seeding, collecting it for a checkpoint, restoring it on a resume.

A checkpoint has what training produced. Settings (learning rate, weight decay, number of epochs, ...) come from the
config of the resumed run, so that they can be changed; differences are logged.
"""

import json
import os
import random

import numpy as np
import torch

from core.agreement import MAY_DIFFER
from core.distributed import all_reduce_
from core.state_file import CheckpointError
from engine.build import unwrap
from engine.monitor import log
from engine.order import ORDER
from engine.schedule import set_step
from losses.classifier import sharded_tensors

# A resumed run must not change these.
SAME_RUN = ("network", "embedding_size", "num_classes", "num_image", "optimizer", "sample_rate", "seed")
# Differences that are not logged.
UNLOGGED = ("resume", "overwrite", "config_file", "name", "workspace", "batch_size", "gradient_acc")
# Keys without effect on model.pt: a run that differs in them alone is the same one. Of files the contents count.
WITHOUT_EFFECT = MAY_DIFFER | {"scenario", "resume", "overwrite", "verbose", "val_targets", "save_all_states"}
WITHOUT_EFFECT |= {"checkpoint_steps", "timeout", "best_by"}


def seed_everything(seed, deterministic):
    """Seed Python, NumPy and torch; `deterministic`: slower kernels with bit-identical results."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


# --- collecting -------------------------------------------------------------------------------------------------------


def settings_of(run):
    """The method, and all values and files that decide what the Trainer `run` trains, as JSON has them."""
    values = {key: value for key, value in run.cfg.items() if key not in WITHOUT_EFFECT and _is_plain(value)}
    files = {f"digest of {key}": digest for key, digest in run.made_from.items()}
    return json.loads(json.dumps({"method": type(run).__name__, "ranks": run.world_size, **values, **files}))


def state_of(run):
    """The whole state of this rank of the Trainer `run`, in tensors and plain values only."""
    return {
        "images": run.epoch * run.cfg.num_image + (run.step - run.epoch * run.steps_per_epoch) * run.global_batch,
        "epoch": run.epoch,
        "step": run.step,
        "total_steps": run.total_steps,
        "world_size": run.world_size,
        "global_batch": run.global_batch,
        "method": type(run).__name__,
        "made_from": run.made_from,
        "order": ORDER,
        "config": {key: value for key, value in run.cfg.items() if _is_plain(value)},
        "best": dict(run.best),
        "backbone": unwrap(run.backbone).state_dict(),
        "classifier": run.classifier.state_dict(),
        "extra": run.extra.state_dict(),
        "class_sharded": _class_sharded(run),
        "sampling": run.classifier.sampling_state(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "skipped": None if run.scaler.skipped is None else int(run.scaler.skipped),
        "random": _random_state(run),
    }


def _is_plain(value):
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _class_sharded(run):
    """`[(path, dim)]` of the class-sharded tensors in the state, for engine.checkpoint.reshard.

    A path is a tuple of keys into the state, such as ("optimizer", "state", 7, "momentum_buffer"): optimiser state of a
    sharded parameter's shape is sharded like it.
    """
    paths, dims = [], {}
    for key in ("classifier", "extra"):
        for name, tensor, dim in sharded_tensors(getattr(run, key)):
            paths.append(((key, name), dim))
            dims[tensor] = dim
    parameters = (parameter for group in run.optimizer.param_groups for parameter in group["params"])
    for number, parameter in enumerate(parameters):  # numbered as in the optimiser's state dict
        for key, value in run.optimizer.state.get(parameter, {}).items() if parameter in dims else ():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                paths.append((("optimizer", "state", number, key), dims[parameter]))
    return paths


def _random_state(run):
    """States of Python's, NumPy's, torch's and the run's own generator."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "run": run.generator.get_state(),
        "cuda": torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None,
    }


def named_tensors(run):
    """Yield `(name, tensor)` of this rank's parameters and floating-point buffers."""
    for prefix, module in (("backbone", unwrap(run.backbone)), ("classifier", run.classifier), ("extra", run.extra)):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                yield f"{prefix}.{name}", tensor


def refuse_non_finite_weights(run):
    """Raise CheckpointError on all ranks if any rank has non-finite weights or statistics."""
    tensors = dict(named_tensors(run))
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()])
    everywhere = all_reduce_(finite.all().int(), torch.distributed.ReduceOp.MIN)
    if not everywhere:
        broken = [name for name, good in zip(tensors, finite.tolist()) if not good]
        raise CheckpointError(
            f"step {run.step}: NaN or infinity in {', '.join(broken[:5]) or 'another rank'}"
            f"{f' and {len(broken) - 5} more' if len(broken) > 5 else ''}; nothing saved. Lower lr or raise "
            f"warmup_epoch, then restart, with --resume True if {run.cfg.output} has checkpoints"
        )


# --- restoring --------------------------------------------------------------------------------------------------------


def restore(run, state, path):
    """Restore the Trainer `run` from the checkpoint `state`, read from the file `path`.

    Raises CheckpointError for a checkpoint of another run.
    """
    try:
        _check_same_run(run, state, path)
        _restore(run, state)
    except KeyError as error:
        raise CheckpointError(
            f"{path}: has no {error}, so another version of this code wrote it; resume with that version, or choose "
            "another `output`"
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = str(error).replace("\n", " ")[:300]
        raise CheckpointError(f"{path}: does not fit this run ({reason}); choose another `output`") from error
    _log_differences(run, state)


def _restore(run, state):
    unwrap(run.backbone).load_state_dict(state["backbone"])
    run.classifier.load_state_dict(state["classifier"])
    run.classifier.set_sampling_state(state["sampling"])
    run.extra.load_state_dict(state["extra"])
    _load_optimizer(run.optimizer, state["optimizer"])
    if run.scaler.is_enabled() and state["scaler"]:  # empty: written with another amp_dtype
        run.scaler.load_state_dict(state["scaler"])
        run.scaler.skipped = None if state["skipped"] is None else torch.tensor(state["skipped"], device=run.device)
    if state["random"] is not None:
        _set_random_state(run, state["random"])
    if state["config"].get("best_by", "self") == run.cfg.best_by:  # accuracies of two tests do not compare
        run.best = dict(state["best"])
    # Continue at the same image of the same epoch, also with another global batch; rounded up to a whole step.
    run.epoch = state["epoch"]
    done = -(-(state["images"] - run.epoch * run.cfg.num_image) // run.global_batch)
    run.step = run.epoch * run.steps_per_epoch + min(done, run.steps_per_epoch)
    set_step(run.schedule, run.step)


def _check_same_run(run, state, path):
    if state.get("order") != ORDER:
        raise CheckpointError(
            f"{path}: written by a version that draws the images in another order ({state.get('order')}, now {ORDER}): "
            "finish the run with that version, or choose another `output`"
        )
    for key, name in {"records": "rec", "old_model": "old_model_path"}.items():
        before = state.get("made_from", {}).get(key)
        if before and run.made_from.get(key, before) != before:
            raise CheckpointError(
                f"{path}: written with another {name} than {run.cfg[name]}, by its contents; "
                "put that one back to resume, or choose another `output`"
            )
    for key in (*SAME_RUN, *run.same_run):
        before, now = state["config"].get(key, run.cfg[key]), run.cfg[key]
        if before != now:
            raise CheckpointError(
                f"{path}: written with {key} = {before!r}, this run has {now!r}; restore {key} to resume, "
                "or choose another `output`"
            )
    if state["global_batch"] == run.global_batch:
        return
    if state["world_size"] == run.world_size:
        before, now = ([c["batch_size"], c["gradient_acc"]] for c in (state["config"], run.cfg))
        raise CheckpointError(
            f"{path}: written with batch_size = {before[0]} and gradient_acc = {before[1]}, this run has {now[0]} "
            f"and {now[1]}; restore batch_size to resume, or choose another `output`"
        )
    log.warning(
        "%s: written by %d ranks with a global batch of %d images, this run of %d ranks has %d; lr is not rescaled. "
        "For the same steps, choose batch_size and gradient_acc so that ranks x batch_size x gradient_acc is %d",
        path,
        state["world_size"],
        state["global_batch"],
        run.world_size,
        run.global_batch,
        state["global_batch"],
    )


def _load_optimizer(optimizer, state):
    """Load momentum etc. from the checkpoint; learning rate, weight decay etc. stay the config's."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    # Before loading, because a setting decides the device of some of the state.
    groups = [{**group, **setting} for group, setting in zip(state["param_groups"], settings)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, its in optimizer.state.items():
        for key, value in its.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                its[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)  # channels_last has changed


def _set_random_state(run, state):
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    run.generator.set_state(state["run"].cpu())
    if state["cuda"] is not None and run.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), run.device)


def _log_differences(run, state):
    if state["method"] != type(run).__name__:
        log.warning("the checkpoint was written by %s, this run uses %s", state["method"], type(run).__name__)
    for key, now in run.cfg.items():
        before = state["config"].get(key, now)
        if key not in UNLOGGED and before != now and not (isinstance(now, (list, tuple)) and list(before) == list(now)):
            log.info("changed since the checkpoint: %s was %r, now %r", key, before, now)
