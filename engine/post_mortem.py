"""The report on a non-finite loss: an error message with advice, and a file for debugging.

`nonfinite_step_{step}_rank_{rank}.pt` in the run's `output`, one per rank, has:

    step, epoch     optimiser steps done before the batch, and its epoch
    terms, before   the loss terms {name: float}; [(step, terms)] of up to 100 batches before, oldest first
    rows, keys      int64 [B]: the batch's rows in the training set; their keys in the record file, or None
    labels          int64 [B]
    mirrored        bool [B]: which images were flipped
    broken          names of this rank's parameters and buffers with NaN or infinity
    state           as in a checkpoint (engine/run_state.py)

To run the backbone on the batch:

    found = core.state_file.load("work_dirs/<run>/nonfinite_step_<step>_rank_0.pt")
    config = found["state"]["config"]
    backbone = backbones.get_model(config["network"], num_features=config["embedding_size"])
    backbone.load_state_dict(found["state"]["backbone"])
    images = torch.stack([dataset.RecordDataset(config["rec"])[row][0] for row in found["rows"]])
    embeddings = backbone.train()(dataset.to_input(images, found["mirrored"]))

To reproduce the step, resume from the last checkpoint: with `deterministic = True` it repeats bit for bit.
"""

import pathlib

import numpy as np
import torch

from core.state_file import save_atomically
from engine.order import ShuffledRows
from engine.run_state import named_tensors, state_of

NAMED = 8  # images and tensors named in the message; the file has all


def explain(run, error):
    """Write the file, and extend the message of the NonFiniteLoss `error` with what the Trainer `run` knows.

    Each rank calls it on its own, without collectives. If the file cannot be written, the message says so.
    """
    path = pathlib.Path(run.cfg.output) / f"nonfinite_step_{error.step}_rank_{run.rank}.pt"
    rows, keys = error.rows.numpy(), getattr(run.train_set, "keys", None)  # a synthetic set has no keys
    keys = None if keys is None else torch.tensor([int(keys[row]) for row in rows])
    broken = [name for name, tensor in named_tensors(run) if not torch.isfinite(tensor).all()]
    labels = torch.tensor([run.train_set.label(row) for row in rows.tolist()])
    plan = ShuffledRows(len(run.train_set), run.cfg.batch_size, run.cfg.seed, run.rank, run.world_size)
    plan.epoch = error.step // run.steps_per_epoch
    mirrored = next((torch.from_numpy(flips) for its_rows, flips in plan if np.array_equal(its_rows, rows)), None)
    found = {"step": error.step, "epoch": plan.epoch, "terms": error.terms, "before": list(run.monitor.recent)}
    found |= {"rows": error.rows, "keys": keys, "labels": labels, "mirrored": mirrored, "broken": broken}
    try:
        save_atomically({**found, "state": state_of(run)}, path)
        file = f"more in {path}"
    except Exception as problem:  # must not hide the loss
        file = f"{path.name} cannot be written: {type(problem).__name__}: {problem}"
    before = ", ".join(f"{sum(terms.values()):.6g}" for _, terms in found["before"][-3:])
    images = f"rows {_some(rows)}" if keys is None else f"keys {_some(keys.tolist())}"
    error.args = (
        f"{error}{before and f' (before it {before})'}. This rank's batch: {images} of {run.train_set.path}; {file}. "
        f"{_advice(run, error, broken)}, then resume with --resume True",
    )


def _some(names):
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(str, names[:NAMED])) + more


def _advice(run, error, broken):
    slower = "lower lr or raise warmup_epoch" + ("" if run.cfg.clip_grad_norm else ", or set clip_grad_norm = 5.0")
    scaled = run.scaler.is_enabled()
    if run.step > error.step and not scaled:  # the bad step was applied: the weights no longer tell the cause
        return slower.capitalize()
    parameters = {name for name, tensor in named_tensors(run) if isinstance(tensor, torch.nn.Parameter)}
    weights = [name for name in broken if name in parameters]  # BatchNorm statistics may be broken by this batch
    if weights:
        return f"An earlier step broke {_some(weights)}: {slower}"
    if scaled:
        return 'The weights are finite, float16 overflows at 65504: set amp_dtype = "bfloat16" or fp16 = False'
    return f"The weights are finite: check the terms and the images, or {slower}"
