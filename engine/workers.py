"""The processes that decode for a loader: how they begin and end, and what is said when one dies."""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading

import cv2

from core.errors import UserError
from recordio import RecordError


class WorkerError(UserError):
    """A data worker could not start or has died; the message says of what, and what to do."""


class FileSize:
    """The size of a record file that is read through a mapping, where bytes that are no more end the process by SIGBUS.

    A file that another took the place of, or that was deleted, is still there for those who have it mapped.
    """

    def __init__(self, path):
        self.path = path
        self.was = os.stat(path) if os.path.isfile(path) else None  # a synthetic set has none

    def check(self):
        """Raise RecordError where the file is shorter or longer than at first, or its disk is gone."""
        try:
            now = os.stat(self.path) if self.was else None
        except FileNotFoundError:
            return
        except OSError as error:
            raise RecordError(f"{self.path}: out of reach now ({error.strerror}); is its disk still there?") from None
        if now and os.path.samestat(now, self.was) and now.st_size != self.was.st_size:
            raise RecordError(
                f"{self.path}: {now.st_size} bytes, but {self.was.st_size} when it was opened: cut or overwritten. Put "
                f"the whole file back and start again, a training with resume = True"
            )


def start_worker(_):
    """What a worker does first."""
    cv2.setNumThreads(0)  # the workers are the parallelism
    gc.freeze()  # the parent's objects are not for this process to walk through again and again
    if hasattr(signal, "sigtimedwait"):
        # A launcher sends SIGTERM to all processes of the run. The training process then finishes its step, for which
        # it may need the next batch, and ends its workers itself: only its own SIGTERM counts here. (To ignore the
        # signal would be to hang: at its exit Python sends it to the workers that are left, and waits for them.)
        # A forked process has no thread yet in which the signal would not be blocked.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """End this process when the training process says so or, within seconds, when that was killed."""
    parent = multiprocessing.parent_process()
    while parent.is_alive():
        received = signal.sigtimedwait([signal.SIGTERM], 1)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


class Workers:
    """The processes of one loader.

    file: the FileSize of the record file that they read; count: how many they are, num_workers in the config.
    """

    def __init__(self, file, count):
        self.file, self.count, self.processes = file, count, []

    @contextlib.contextmanager
    def starting(self):
        """Around the code that starts them.

        A DataLoader has Python raise its error about a dead worker wherever the main program is, a checkpoint half
        written perhaps. That is undone here: a death is noticed where the next batch is asked for.
        """
        before, on_child = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        try:
            yield
        finally:
            self.processes += [process for process in multiprocessing.active_children() if process not in before]
            if on_child is not None and signal.getsignal(signal.SIGCHLD) is not on_child:
                signal.signal(signal.SIGCHLD, on_child)

    def dead(self):
        """A process that has died, or None."""
        return next((process for process in self.processes if process.exitcode is not None), None)

    def check(self):
        """Raise for a process that has died: RecordError if its file was cut, else WorkerError."""
        dead = self.dead()
        if dead is None:
            return
        self.file.check()
        killer = -dead.exitcode if dead.exitcode < 0 else None
        if killer == signal.SIGBUS:
            raise WorkerError(
                f"a data worker died of SIGBUS, though {self.file.path} has the size that it had: either shared memory "
                f"is too small (enlarge /dev/shm, docker: --shm-size=8g, or lower num_workers = {self.count}), "
                f"or its disk fails (see dmesg)"
            )
        if killer == signal.SIGKILL:
            raise WorkerError(
                f"a data worker was killed by SIGKILL, as the system does for want of memory (see dmesg): "
                f"lower num_workers = {self.count}, or give the machine or container more memory"
            )
        how = f"of {signal.Signals(killer).name}" if killer else f"with exit code {dead.exitcode}"
        raise WorkerError(
            f"a data worker died {how}; its own message is above. num_workers = 0, instead of {self.count}, decodes in "
            f"the training process and may show more"
        )
