"""A loader's decoding processes: what they share, how they start and end, and the error when one dies."""

import contextlib
import gc
import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from core.errors import UserError
from recordio import RecordError

AHEAD = 2  # batches in progress per worker
FORKED = sys.platform == "linux"  # they share what is in memory and start at once, with one thread: see _start_worker


class WorkerError(UserError):
    """A data worker could not start or has died; the message says why and what to do."""


class FileSize:
    """Detects a change in size of a record file: it was truncated or overwritten.

    A file that was replaced or deleted stays intact for processes that have it open.
    """

    def __init__(self, path):
        self.path = path
        self.was = os.stat(path) if os.path.isfile(path) else None  # a synthetic set has none

    def check(self):
        """Raise RecordError if the file's size has changed or its disk is gone."""
        try:
            now = os.stat(self.path) if self.was else None
        except FileNotFoundError:
            return
        except OSError as error:
            raise RecordError(f"{self.path}: no longer accessible ({error.strerror}); check the disk") from None
        if now and os.path.samestat(now, self.was) and now.st_size != self.was.st_size:
            raise RecordError(
                f"{self.path}: {now.st_size} bytes, but {self.was.st_size} when opened: truncated or overwritten. "
                "Restore the file and start again, a training with resume = True"
            )


def shared_slots(workers, shape, dtype):
    """Memory for the batches that are in progress at once and one in use, shared with the workers: [slots, *shape].

    Slots are reused: a new one per batch would cost a fifth of a worker's time in page faults. They are anonymous
    memory where workers are forked: /dev/shm, through which tensors would be sent, has 64 MB in a container, and a full
    one stops the workers for good.
    """
    shape = workers * AHEAD + 1, *shape
    if not FORKED:
        return torch.from_numpy(np.empty(shape, dtype)).share_memory_()
    return torch.from_numpy(np.ndarray(shape, dtype, mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize)))


def _start_worker(_):
    """Initialise a worker process."""
    cv2.setNumThreads(0)  # the workers are the parallelism
    # Nothing of the parent's is ever collected here: scanning it takes time, and a destructor that waits for a thread,
    # as ONNX Runtime's, would wait for ever, as a fork has none of them. Workers._starting had collections disabled.
    gc.freeze()
    gc.enable()
    if hasattr(signal, "sigtimedwait"):
        # A launcher sends SIGTERM to all processes of the run. The training process then finishes its step, which may
        # need another batch, and ends its workers itself: only its own SIGTERM counts here. (Ignoring the signal would
        # hang: at exit Python sends it to the remaining workers and waits for them.)
        # A forked process has no other thread yet in which the signal would not be blocked.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """Exit when the training process sends SIGTERM or, within seconds, when it was killed."""
    parent = multiprocessing.parent_process()
    while parent.is_alive():
        received = signal.sigtimedwait([signal.SIGTERM], 1)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


class Workers:
    """The processes of one loader: they compute `dataset[item]` for each of `items`, in order.

    file: FileSize of their record file. count: how many, as the user sets it by `option`, a config key or the command
    line's; 0 = in this process.
    """

    def __init__(self, dataset, items, file, count, option="num_workers ="):
        self.file, self.count, self.option, self.processes = file, count, option, []
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=items,
            num_workers=count,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            prefetch_factor=AHEAD if count else None,
            persistent_workers=count > 0,  # else one that has done its share would pass for dead
            multiprocessing_context="fork" if count and FORKED else None,
            generator=torch.Generator(),  # else every pass would draw from the training's generator
        )

    def received(self):
        """The results of all items. A dead worker is reported here, between two results, and nowhere else."""
        self.check()
        try:
            with self._starting():
                batches = iter(self._loader)
            for batch in batches:
                yield batch
                self.check()
        except RuntimeError:
            if not self.dead():
                raise
        self.check()

    @contextlib.contextmanager
    def _starting(self):
        """Wraps the code that starts them: without a garbage collection in them (_start_worker), and restoring the
        SIGCHLD handler.

        A DataLoader's handler raises its error about a dead worker anywhere in the main program, perhaps in the middle
        of a checkpoint. Here a death is reported when the next batch is requested.
        """
        before, on_child = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        except OSError as error:
            raise WorkerError(f"{self.option} {self.count}: cannot be started ({error}); start fewer") from error
        finally:
            if collects:
                gc.enable()
            self.processes += [process for process in multiprocessing.active_children() if process not in before]
            if on_child is not None and signal.getsignal(signal.SIGCHLD) is not on_child:
                signal.signal(signal.SIGCHLD, on_child)

    def dead(self):
        """A dead process, or None."""
        return next((process for process in self.processes if process.exitcode is not None), None)

    def check(self):
        """Raise for a dead process: RecordError if its file changed, else WorkerError."""
        dead = self.dead()
        if dead is None:
            return
        self.file.check()
        killer = -dead.exitcode if dead.exitcode < 0 else None
        if killer == signal.SIGKILL:
            raise WorkerError(
                f"a data worker was killed by SIGKILL, probably out of memory (see dmesg): "
                f"lower {self.option} {self.count}, or give the machine or container more memory"
            )
        how = f"of {signal.Signals(killer).name}" if killer else f"with exit code {dead.exitcode}"
        raise WorkerError(
            f"a data worker died {how}; its own message is above, the kernel's in dmesg. Set {self.option} 0 (now "
            f"{self.count}) to decode in the main process and see more"
        )


def _unchanged(batch):
    return batch
