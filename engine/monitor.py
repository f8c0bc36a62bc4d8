"""What a run reports: log lines, a progress bar, TensorBoard scalars, and the stop on a non-finite loss."""

import collections
import contextlib
import logging
import logging.handlers
import math
import pathlib
import sys
import time

import torch
from tqdm import tqdm

from core.distributed import is_main
from core.errors import UserError

RECENT = 100  # batches whose loss terms are kept for the report on a non-finite loss
SKIPS_TO_WARN = 10  # consecutive skipped steps; fewer are normal while the loss scale settles

log = logging.getLogger("bct")


class _TerminalHandler(logging.StreamHandler):
    """Writes above an open progress bar."""

    def emit(self, record):
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def init_logging(main):
    """Log to the terminal; other ranks than the main one log only warnings. `log_to_file` adds a file."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()  # the earlier run's training.log
    log.propagate = False
    log.setLevel(logging.INFO if main else logging.WARNING)
    _add_handler(_TerminalHandler(sys.stdout))
    if main:
        log.addHandler(logging.handlers.MemoryHandler(0))  # keeps the lines until there is a file


def log_to_file(output):
    """On the main rank: write what was logged so far, and from now on, to `output`/training.log as well."""
    *_, waiting = log.handlers
    log.removeHandler(waiting)
    _add_handler(logging.FileHandler(pathlib.Path(output) / "training.log", encoding="utf-8"))
    waiting.setTarget(log.handlers[-1])
    waiting.close()


def _add_handler(handler):
    handler.setFormatter(logging.Formatter("Training: %(asctime)s-%(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)


class NonFiniteLoss(UserError):
    """A loss term became NaN or infinite.

    step: optimiser steps done before the batch; terms: {name: float}; rows: int64 [B], this rank's batch.
    """

    def __init__(self, step, terms, rows):
        listed = ", ".join(f"{name} {value:.6g}" for name, value in terms.items())
        super().__init__(f"step {step}: the loss is not finite: {listed}")
        self.step, self.terms, self.rows = step, terms, rows


class Monitor:
    """Averages the loss terms between two log lines; writes insightface's log line and TensorBoard scalars.

    Terms are the same on all ranks, so nothing is reduced here. On CUDA a step's terms are read one step later, so that
    the host queues the next step before it waits for the device. A context manager that closes the bar and `writer` and
    logs an error to training.log.

    total_steps: of the whole run; start_step: steps done before a resume; images_per_step: over all ranks.
    """

    def __init__(self, total_steps, images_per_step, start_step, writer=None):
        self.total_steps, self.images_per_step, self.writer = total_steps, images_per_step, writer
        self.sums, self.count, self.pending = {}, 0, None
        self.recent = collections.deque(maxlen=RECENT)  # (step, {term: value}), oldest first
        self.skipped, self.skips_in_a_row = (start_step, None), 0
        self.begin = None  # (step, time) after the first log line; until then workers start and kernels compile
        self.lap, self.paused = (start_step, time.perf_counter()), 0.0
        watched = is_main() and sys.stdout.isatty() and sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=not watched)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        self.bar.close()
        if error is not None:  # report_errors prints it on the terminal
            for handler in log.handlers:
                if isinstance(handler, logging.FileHandler):
                    message = f"ended by {kind.__name__}: {error}"
                    handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, message, (), None))
        if self.writer is not None:
            with contextlib.suppress(OSError):
                self.writer.close()

    def scalar(self, name, value, step):
        """Log a finite value to TensorBoard on the rank that writes it. A full disk only ends TensorBoard logging."""
        if self.writer is None or not math.isfinite(value):
            return
        try:
            self.writer.add_scalar(name, value, step)
        except OSError as error:
            self.writer = None
            log.warning("TensorBoard logging stopped, training continues: %s", error)

    def update(self, step, terms, index):
        """Record the terms `{name: 0-d tensor}` of `step`; `index`: the rows of this rank's batch.

        Raises NonFiniteLoss for this step's terms on the CPU, for the previous step's on CUDA.
        """
        self.bar.update(step - self.bar.n)
        values, event = torch.stack([term.detach().float() for term in terms.values()]), None
        if values.is_cuda:
            values, event = values.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        earlier, self.pending = self.pending, (step, list(terms), values, index, event)
        self._take(earlier)
        if event is None:
            self.flush()

    def flush(self):
        """Record the terms still pending on the device."""
        record, self.pending = self.pending, None
        self._take(record)

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

    @contextlib.contextmanager
    def pause(self):
        """`with monitor.pause():` excludes work other than training (verification, checkpoints) from the speed."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - start

    def line(self, step, epoch, lr, scaler=None):
        """After `step` steps: a log line in insightface's format, and the scalars to TensorBoard.

        Additional values follow at the end of the line, so that parsers of insightface's logs still work.
        """
        rate, left = self._speed(step)
        terms = {name: total / max(self.count, 1) for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        scalars = {"loss": sum(terms.values()), "lr": lr, "speed": rate * self.images_per_step}
        text = f"Speed {scalars['speed']:.2f} samples/sec   Loss {scalars['loss']:.4f}   "
        text += f"LearningRate {lr:.6f}   Epoch: {epoch}   Global Step: {step}   "
        after = [f"{name} {value:.4f}" for name, value in terms.items()] if len(terms) > 1 else []
        if scaler is not None and scaler.is_enabled():  # reading these syncs with the device
            scalars["grad_scale"], scalars["skipped_steps"] = scaler.get_scale(), int(scaler.skipped)
            text += f"Fp16 Grad Scale: {scalars['grad_scale']:.0f}   "
            after.append(f"Skipped Steps: {scalars['skipped_steps']}")
            self._warn_of_skipped(step, scalars["skipped_steps"], scalars["grad_scale"])
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"epoch {epoch}, loss {scalars['loss']:.4f}", refresh=False)
        log.info("%s", "   ".join([f"{text}Required: {left / 3600:.1f} hours", *after]))
        for name, value in {**scalars, **{f"loss/{name}": value for name, value in terms.items()}}.items():
            self.scalar(name, value, step)

    def _speed(self, step):
        """`(training steps/s since the last line, seconds left if pauses stay as frequent)`."""
        now = time.perf_counter()
        rate = (step - self.lap[0]) / (now - self.lap[1] - self.paused)
        begin = self.begin or self.lap
        left = (now - begin[1]) / max(step - begin[0], 1) * (self.total_steps - step)
        self.lap, self.paused = (step, now), 0.0
        self.begin = self.begin or self.lap
        return rate, left

    def _warn_of_skipped(self, step, skipped, scale):
        """Warn once when the weights have stopped changing."""
        (last_step, last_skipped), self.skipped = self.skipped, (step, skipped)
        before = self.skips_in_a_row
        if last_skipped is not None:
            all_skipped = skipped - last_skipped >= step - last_step
            self.skips_in_a_row = before + step - last_step if all_skipped else 0
        if before < SKIPS_TO_WARN <= self.skips_in_a_row and is_main():
            log.warning(
                "step %d: the last %d steps were all skipped, with non-finite gradients at a loss scale of %g: the "
                'weights do not change. Set amp_dtype = "bfloat16" or fp16 = False, and resume with --resume True',
                *(step, self.skips_in_a_row, scale),
            )
