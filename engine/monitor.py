"""What a run tells: log lines, TensorBoard scalars, and a stop at a loss that is no number."""

import logging
import math
import pathlib
import sys
import time

import torch

from engine.errors import UserError

log = logging.getLogger("bct")


def init_logging(output, main):
    """Log to the terminal and, on the main rank, to `output`/training.log; other ranks log warnings alone."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if main else logging.WARNING)
    handlers = [logging.StreamHandler(sys.stdout)]
    if main:
        pathlib.Path(output).mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(pathlib.Path(output) / "training.log"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("Training: %(asctime)s-%(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)


class NonFiniteLoss(UserError):
    """A loss term became NaN or infinite; the message names the step, the terms and the images of the batch."""


class Monitor:
    """Averages the loss terms between two log lines and writes insightface's line and TensorBoard scalars.

    Terms are the same on all ranks, so nothing is reduced here. On CUDA a step's terms are read one step later, so that
    the host never waits for the device before it has launched the next step.
    """

    def __init__(self, cfg, total_steps, images_per_step, start_step, writer=None):
        self.cfg, self.total_steps, self.images_per_step, self.writer = cfg, total_steps, images_per_step, writer
        self.sums, self.count, self.pending = {}, 0, None
        self.start_step, self.start_time = start_step, time.perf_counter()
        self.restart_clock(start_step)

    def update(self, step, terms, index):
        """Take in the terms `{name: 0-d tensor}` of `step`, whose batch on this rank has the rows `index`.

        Raises NonFiniteLoss: for this step's terms on the CPU, for those of the step before on CUDA.
        """
        values = torch.stack([term.detach().float() for term in terms.values()])
        if values.is_cuda:
            values, event = values.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
            previous, self.pending = self.pending, (step, list(terms), values, index, event)
            self._take(previous)
        else:
            self._take((step, list(terms), values, index, None))

    def _take(self, record):
        if record is None:
            return
        step, names, values, index, event = record
        if event is not None:
            event.synchronize()
        values = dict(zip(names, values.tolist()))
        if not all(map(math.isfinite, values.values())):
            raise NonFiniteLoss(
                f"step {step}: loss terms {values} are not finite; "
                f"rows of this rank's batch in {self.cfg.rec}: {index.tolist()}. "
                "Look at those images; else lower lr, add warmup_epoch, or set fp16 = False"
            )
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def restart_clock(self, step):
        """Count the speed from now on, after `step` steps: what was done since the last line was not all training."""
        self.tick = (step, time.perf_counter())

    def flush(self):
        """Take in what is still on its way from the device."""
        record, self.pending = self.pending, None
        self._take(record)

    def line(self, step, epoch, lr, scaler=None):
        """After `step` steps: write one line of the log, and the scalars to TensorBoard."""
        now = time.perf_counter()
        speed = self.images_per_step * (step - self.tick[0]) / (now - self.tick[1])
        self.tick = (step, now)
        terms = {name: total / max(self.count, 1) for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        loss = sum(terms.values())
        done = max(step - self.start_step, 1)
        hours = (now - self.start_time) / done * (self.total_steps - step) / 3600
        text = f"Speed {speed:.2f} samples/sec   Loss {loss:.4f}   "
        if len(terms) > 1:
            text += "".join(f"{name} {value:.4f}   " for name, value in terms.items())
        text += f"LearningRate {lr:.6f}   Epoch: {epoch}   Global Step: {step}   "
        if scaler is not None and scaler.is_enabled():  # asking for these makes the host wait for the device
            text += f"Fp16 Grad Scale: {scaler.get_scale():.0f}   Skipped Steps: {int(scaler.skipped)}   "
        log.info("%sRequired: %.1f hours", text, hours)
        if self.writer is not None:
            scalars = {
                "loss": loss,
                "lr": lr,
                "speed": speed,
                **{f"loss/{name}": value for name, value in terms.items()},
            }
            for name, value in scalars.items():
                if math.isfinite(value):
                    self.writer.add_scalar(name, value, step)
