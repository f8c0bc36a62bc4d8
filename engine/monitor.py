"""What a run tells: log lines, a progress bar, TensorBoard scalars, and a stop at a loss that is no number."""

import collections
import contextlib
import logging
import math
import pathlib
import sys
import time

import torch
from tqdm import tqdm

from core.distributed import is_main
from core.errors import UserError

RECENT = 100        # batches whose terms are kept, to be looked at when one is no number
SKIPS_TO_WARN = 10  # steps skipped in a row; fewer belong to a loss scale that is still looking for its level

log = logging.getLogger("bct")


class _TerminalHandler(logging.StreamHandler):
    """Writes above the progress bars that are open, whose line it would tear apart; without any, plainly."""

    def emit(self, record):
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def init_logging(output, main):
    """Log to the terminal and, on the main rank, to `output`/training.log; other ranks log warnings alone."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if main else logging.WARNING)
    handlers = [_TerminalHandler(sys.stdout)]
    if main:
        pathlib.Path(output).mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(pathlib.Path(output) / "training.log"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("Training: %(asctime)s-%(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)


def _to_file(line):
    """Log to training.log alone: of what the terminal learns in another way."""
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, line, (), None))


class NonFiniteLoss(UserError):
    """A loss term became NaN or infinite.

    step: optimiser steps that were done when the batch was taken; terms: {name: float}; rows: int64 [B], the batch of
    this rank. engine/post_mortem.py adds to the message what the run can say about it.
    """

    def __init__(self, step, terms, rows):
        super().__init__(f"step {step}: the loss is not finite: {in_words(terms)}")
        self.step, self.terms, self.rows = step, terms, rows


class _Clock:
    """The time that training takes, without the pauses in it, and what is left of a run."""

    def __init__(self, step):
        self.paused, self.pauses = 0.0, {}  # in all; {kind: (seconds, times, steps between two)}
        self.start = self.tick = (step, self.now())
        self.warm = False

    def now(self):
        """Seconds from an arbitrary moment, which stand still in a pause."""
        return time.perf_counter() - self.paused

    @contextlib.contextmanager
    def pause(self, kind, every):
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self.paused += spent
            seconds, times, _ = self.pauses.get(kind, (0.0, 0, every))
            self.pauses[kind] = (seconds + spent, times + 1, every)

    def lap(self, step, total):
        """After `step` of `total` steps: `(steps a second since the last lap, seconds left)`."""
        now = self.now()
        rate = (step - self.tick[0]) / (now - self.tick[1])
        per_step = (now - self.start[1]) / max(step - self.start[0], 1)
        per_step += sum(seconds / times / every for seconds, times, every in self.pauses.values())
        self.tick = (step, now)
        if not self.warm:  # the first steps wait for workers to start, kernels to be chosen, code to be compiled
            self.start, self.warm = self.tick, True
        return rate, per_step * (total - step)


class Monitor:
    """Averages the loss terms between two log lines and writes insightface's line and TensorBoard scalars.

    Terms are the same on all ranks, so nothing is reduced here. On CUDA a step's terms are read one step later, so that
    the host never waits for the device before it has launched the next step. On a terminal rank 0 shows a progress bar.
    Used as a context manager it closes bar and `writer` however the block ends, and notes an error in training.log.

    total_steps: of the whole run; start_step: those done before, of a resumed one; images_per_step: on all ranks.
    """

    def __init__(self, cfg, total_steps, images_per_step, start_step, writer=None):
        self.cfg, self.total_steps, self.images_per_step, self.writer = cfg, total_steps, images_per_step, writer
        self.sums, self.count, self.pending = {}, 0, None
        self.recent = collections.deque(maxlen=RECENT)  # (step, {term: value}), oldest first
        self.skipped, self.skips_in_a_row, self.warned = None, 0, False
        self.clock = _Clock(start_step)
        self.bar = _progress_bar(total_steps, start_step)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        self.bar.close()
        if error is not None:
            _to_file(f"ended by {kind.__name__}: {error}")
        with self._without_tensorboard():
            if self.writer is not None:
                self.writer.close()

    def scalar(self, name, value, step):
        """To TensorBoard, if this rank writes to it, and only if it is finite."""
        with self._without_tensorboard():
            if self.writer is not None and math.isfinite(value):
                self.writer.add_scalar(name, value, step)

    @contextlib.contextmanager
    def _without_tensorboard(self):
        """A disk that is full is for the checkpoint to complain of, which says what to do."""
        try:
            yield
        except OSError as error:
            self.writer = None
            log.warning("TensorBoard gets nothing from here on: %s", error)

    def update(self, step, terms, index):
        """Take in the terms `{name: 0-d tensor}` of `step`, whose batch on this rank has the rows `index`.

        Raises NonFiniteLoss: for this step's terms on the CPU, for those of the step before on CUDA.
        """
        self.bar.update(step - self.bar.n)
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
            raise NonFiniteLoss(step, values, index)
        self.recent.append((step, values))
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def flush(self):
        """Take in what is still on its way from the device."""
        record, self.pending = self.pending, None
        self._take(record)

    def pause(self, kind, every):
        """`with monitor.pause("verification", 2000):` this is no training, and comes once in `every` steps.

        Its time does not count for the speed; that of those to come is part of the time left. Not to be nested.
        """
        return self.clock.pause(kind, every)

    def line(self, step, epoch, lr, scaler=None):
        """After `step` steps: write one line of the log, and the scalars to TensorBoard.

        The line is insightface's, as tools that read logs know it; what it has no place for comes after.
        """
        rate, left = self.clock.lap(step, self.total_steps)
        terms = {name: total / max(self.count, 1) for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        scalars = {"loss": sum(terms.values()), "lr": lr, "speed": rate * self.images_per_step}
        text = f"Speed {scalars['speed']:.2f} samples/sec   Loss {scalars['loss']:.4f}   "
        text += f"LearningRate {lr:.6f}   Epoch: {epoch}   Global Step: {step}   "
        after = [f"{name} {value:.4f}" for name, value in terms.items()] if len(terms) > 1 else []
        if scaler is not None and scaler.is_enabled():  # asking for these makes the host wait for the device
            scalars["grad_scale"], scalars["skipped_steps"] = scaler.get_scale(), int(scaler.skipped)
            text += f"Fp16 Grad Scale: {scalars['grad_scale']:.0f}   "
            after.append(f"Skipped Steps: {scalars['skipped_steps']}")
            self._watch_skipped(step, scalars["skipped_steps"], scalars["grad_scale"])
        self.bar.update(step - self.bar.n)
        left_words = tqdm.format_interval(left)
        self.bar.set_postfix_str(f"{left_words} left, epoch {epoch}, loss {scalars['loss']:.4f}, lr {lr:.6f}", False)
        log.info("%s", "   ".join([f"{text}Required: {left / 3600:.1f} hours", *after]))
        for name, value in {**scalars, **{f"loss/{name}": value for name, value in terms.items()}}.items():
            self.scalar(name, value, step)

    def _watch_skipped(self, step, skipped, scale):
        """Say once that the weights have ceased to move: a skip now and then is how the scale finds its level."""
        if self.skipped is not None:
            since, steps = skipped - self.skipped[1], step - self.skipped[0]
            self.skips_in_a_row = self.skips_in_a_row + steps if since >= steps else 0
        self.skipped = (step, skipped)
        if self.skips_in_a_row >= SKIPS_TO_WARN and not self.warned and is_main():
            self.warned = True
            log.warning(
                "step %d: the last %d steps were all skipped, their gradients are not finite at a loss scale of %g: "
                'the weights do not move. Set amp_dtype = "bfloat16", or fp16 = False, and go on with --resume True',
                *(step, self.skips_in_a_row, scale),
            )


def _progress_bar(total, start):
    """A bar over the steps of the run, where a person watches: on rank 0, when both outputs are a terminal.

    A log that goes elsewhere holds nothing of it; one that is piped back to the terminal would tear it apart.
    """
    watched = is_main() and sys.stdout.isatty() and sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=start,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5,  # seconds between two drawings
        miniters=1,
        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        disable=not watched,
    )


def in_words(terms):
    """Loss terms {name: number} for a person to read."""
    return ", ".join(f"{name} {value:.6g}" for name, value in terms.items())
