"""Stopping on a signal, or when the launcher is gone: all ranks finish the same step, write a checkpoint and stop."""

import os
import pathlib
import shlex
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from core.distributed import world_size
from core.errors import warn

# Slurm sends SIGTERM at the time limit, SIGUSR1 earlier on request; SIGHUP comes with the end of a terminal.
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
if hasattr(signal, "SIGHUP"):
    SIGNALS.append(signal.SIGHUP)
ORPHANED = 1000  # in place of a signal's number
SAME_PRESS = 2.0  # seconds: a rank gets one Ctrl-C twice, from the terminal and from torchrun


class StopRequest:
    """In its `with` block SIGNALS are recorded instead of ending the process; `agreed` says when to stop.

    A signal that was ignored at the start stays ignored (nohup, a background job). A second Ctrl-C ends the process at
    once. A rank that torchrun started also stops when torchrun is gone, killed by a signal that it does not pass on.
    device: of the training; the ranks agree there, without making the host wait for CUDA. Outside the main thread (in
    a notebook) Python allows no handlers, and signals keep their effect.
    """

    def __init__(self, device):
        self.device = device
        self.received = 0
        self.pressed = None  # when Ctrl-C was
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.pending = None

    def __enter__(self):
        numbers = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self.before = {
            number: signal.signal(number, self._remember)
            for number in numbers
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python

    def _remember(self, number, _):
        if number == signal.SIGINT:
            if self.pressed is not None and time.monotonic() - self.pressed > SAME_PRESS:
                raise KeyboardInterrupt
            self.pressed = self.pressed or time.monotonic()
        self.received = number

    def agreed(self):
        """Why all ranks stop now, such as "SIGTERM", or None. All ranks call it once per step.

        One rank's signal is enough, and all get the same answer at the same step, so none is left waiting in a
        collective. With several ranks on CUDA it is the previous step's answer.
        """
        if self.launcher is not None and os.getppid() != self.launcher:
            self.received = ORPHANED
        number = self.received if world_size() == 1 else self._ask()
        if number == ORPHANED:
            return "the end of torchrun"
        return signal.Signals(number).name if number else None

    def _ask(self):
        flag = torch.tensor(int(self.received), dtype=torch.int32)
        if self.device.type != "cuda":
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            return int(flag)
        flag = flag.pin_memory().to(self.device, non_blocking=True)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        answer, event = flag.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record()
        previous, self.pending = self.pending, (answer, event)
        if previous is None:
            return 0
        answer, event = previous
        event.synchronize()
        return int(answer)


def resume_command():
    """The command that resumes this run, with its launcher; on several machines, what to do on each."""
    words, rest = [], list(sys.argv)
    while rest:
        word = rest.pop(0)
        if word == "--resume":
            rest[: bool(rest) and not rest[0].startswith("--")] = []
        elif not word.startswith(("--local-rank", "--local_rank", "--resume=")):
            words.append(word)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ranks < int(os.environ.get("WORLD_SIZE", 1)):
        return "start it as before on every machine, with --resume True"
    launcher = ["torchrun", f"--nproc_per_node={ranks}"] if "RANK" in os.environ else ["python"]
    command = shlex.join([*launcher, *words, "--resume", "True"])
    overrides = os.environ.get("BCT_OVERRIDES")
    return f"BCT_OVERRIDES={shlex.quote(overrides)} {command}" if overrides else command


def warn_of_static_rendezvous():
    """Warn if torchrun restarts ranks on several machines without c10d, where the restarted ranks may wait forever."""
    several = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < int(os.environ.get("WORLD_SIZE", 1))
    if not several or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        return
    try:
        launcher = pathlib.Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return
    if b"c10d" not in launcher:
        warn(
            "torchrun --max-restarts on several machines can hang with a static rendezvous; start it with "
            "--rdzv_backend=c10d --rdzv_id=JOB --rdzv_endpoint=FIRST_HOST:29500 in place of --node_rank and "
            "--master_addr"
        )
