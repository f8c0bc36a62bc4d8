"""What a run leaves behind when its loss is no number: a file to look into, and words on where to begin.

`nonfinite_step_{step}_rank_{rank}.pt` in the run's `output`, one a rank, holds:

    step, epoch, batch   optimiser steps done before the batch; its epoch; its number in the epoch, on this rank
    terms, before        the loss terms {name: float}; [(step, terms)] of up to 100 batches before, oldest first
    rows, keys           int64 [B]: the batch's rows in the training set; their keys in the record file, or None
    labels, mirrored     int64 [B] and bool [B]: the classes of the rows, and which of them were flipped
    lr                   learning rate of the next step
    update_done          whether the optimiser came to do this step: on CUDA, where the loss is read a step late. (With
                         a loss scaler the weights did not move even then, for the gradients were not finite either.)
    broken               names of the parameters and buffers of this rank that hold NaN or infinity
    gradient_norms       {parameter: L2 norm} of the gradients there were, times the loss scale: where gradient_acc is
                         above 1, those of the step's batches before this one
    state                all that a checkpoint holds (engine/run_state.py): weights, optimiser, generators, config, ...

To see on one process what the backbone makes of the batch:

    found = engine.checkpoint.load("work_dirs/<run>/nonfinite_step_<step>_rank_0.pt")
    config = found["state"]["config"]
    backbone = backbones.get_model(config["network"], num_features=config["embedding_size"])
    backbone.load_state_dict(found["state"]["backbone"])
    images = torch.stack([RecordDataset(config["rec"])[row][0] for row in found["rows"]])
    embeddings = backbone.train()(loader.to_input(images, found["mirrored"]))

To see the step itself: from the last checkpoint `--resume True` leads to it again, with `deterministic = True` bit for
bit.
"""

import pathlib

import numpy as np
import torch

from engine.checkpoint import save_atomically
from engine.run_state import named_tensors, state_of
from engine.loader import ShuffledRows

NAMED = 8   # images and tensors that the message names; the file has all


def explain(run, error):
    """Write the file, and add to the message of the NonFiniteLoss `error` what the Trainer `run` knows about it.

    All ranks call it, each for itself: nothing is exchanged. Where the file cannot be written the message says so.
    """
    path = pathlib.Path(run.cfg.output) / f"nonfinite_step_{error.step}_rank_{run.rank}.pt"
    broken = []
    try:
        broken = [name for name, tensor in named_tensors(run) if not torch.isfinite(tensor).all()]
        save_atomically({**_findings(run, error), "broken": broken, "state": state_of(run)}, path)
        remark = f"more in {path}"
    except Exception as problem:  # whatever it is, it must not hide the error itself
        remark = f"{path.name} is not there to look into: {type(problem).__name__}: {problem}"
    before = ", ".join(f"{sum(terms.values()):.6g}" for _, terms in list(run.monitor.recent)[-3:])
    error.args = (
        f"{error}{before and f' (before it {before})'}. This rank's batch: {_images(run, error.rows)} of "
        f"{run.train_set.path}; {remark}. {_advice(run, error, broken)}, then go on with --resume True",
    )


def _findings(run, error):
    rows = error.rows.tolist()
    number, mirrored = _place(run, rows)
    return {
        "step": error.step,
        "epoch": run.epoch,
        "batch": number,
        "terms": error.terms,
        "before": list(run.monitor.recent),
        "rows": error.rows,
        "keys": _keys(run, error.rows),
        "labels": torch.tensor([run.train_set.label(row) for row in rows], dtype=torch.int64),
        "mirrored": mirrored,
        "lr": run.schedule.get_last_lr()[0],
        "update_done": _update_done(run, error),
        "gradient_norms": {
            name: float(_values(tensor.grad).norm()) for name, tensor in named_tensors(run) if tensor.grad is not None
        },
    }


def _place(run, rows):
    """`(number in its epoch, mirrored [B])` of this rank's batch of these rows; None for both if there is no such."""
    plan = ShuffledRows(len(run.train_set), run.cfg.batch_size, run.cfg.seed, run.rank, run.world_size)
    plan.epoch = run.epoch
    for number, (its_rows, mirrored) in enumerate(plan):
        if np.array_equal(its_rows, rows):
            return number, torch.from_numpy(mirrored)
    return None, None


def _keys(run, rows):
    """The record keys of the rows, int64 [B]; None for a synthetic set, which has no records."""
    keys = getattr(run.train_set, "keys", None)
    return None if keys is None else torch.from_numpy(np.asarray(keys)[rows.numpy()].astype(np.int64))


def _values(gradient):
    return gradient.coalesce().values() if gradient.is_sparse else gradient     # of sampled class centres


def _update_done(run, error):
    return run.step > error.step


def _images(run, rows):
    keys = _keys(run, rows)
    return f"rows {_some(rows.tolist())}" if keys is None else f"keys {_some(keys.tolist())}"


def _some(names):
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(str, names[:NAMED])) + more


def _advice(run, error, broken):
    """What to change. (An image is bytes: it can be a bad one, but alone makes no infinity.)"""
    slower = "lower lr or raise warmup_epoch" + ("" if run.cfg.clip_grad_norm else ", or set clip_grad_norm = 5.0")
    scaled = run.scaler.is_enabled()
    if _update_done(run, error) and not scaled:
        return slower.capitalize()      # the weights have taken the bad step: what they hold now says nothing
    parameters = {name for name, tensor in named_tensors(run) if isinstance(tensor, torch.nn.Parameter)}
    weights = [name for name in broken if name in parameters]   # statistics may have taken the batch in already
    if weights:
        return f"A step before it broke {_some(weights)}: {slower}"
    finite = "The weights are finite" + (f" (the statistics {_some(broken)} no more)" if broken else "")
    if scaled:
        return f'{finite}, float16 ends at 65504: set amp_dtype = "bfloat16", or fp16 = False'
    return f"{finite}: look at the terms and the images, or {slower}"
