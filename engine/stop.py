"""Stopping on a signal (SIGTERM from the launcher or scheduler): all ranks finish the same step and stop."""

import os
import shlex
import signal
import sys
import threading

import torch
import torch.distributed as dist

from core.distributed import world_size

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm sends SIGTERM at the time limit, SIGUSR1 earlier on request


class StopRequest:
    """In its `with` block SIGNALS are recorded instead of ending the process; `agreed` says when to stop.

    device: of the training; the ranks agree there, without making the host wait for CUDA. Outside the main thread (in
    a notebook) Python allows no handlers, and signals keep their effect.
    """

    def __init__(self, device):
        self.device = device
        self.received = 0
        self.pending = None

    def __enter__(self):
        numbers = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self.before = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python

    def _remember(self, number, _):
        self.received = number

    def agreed(self):
        """Name of the signal on which all ranks stop now, or None. All ranks call it once per step.

        One rank's signal is enough, and all get the same answer at the same step, so none is left waiting in a
        collective. With several ranks on CUDA it is the previous step's answer.
        """
        number = self.received if world_size() == 1 else self._ask()
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
    """The command that resumes this run, with its launcher."""
    words, rest = [], list(sys.argv)
    while rest:
        word = rest.pop(0)
        if word == "--resume":
            rest[:1] = []
        elif not word.startswith(("--local-rank", "--local_rank", "--resume=")):
            words.append(word)
    ranks, nodes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1
    if "RANK" in os.environ:
        nodes = int(os.environ["WORLD_SIZE"]) // ranks
        launcher = ["torchrun", f"--nproc_per_node={ranks}", *([f"--nnodes={nodes}"] if nodes > 1 else [])]
    else:
        launcher = ["python"]
    command = shlex.join([*launcher, *words, "--resume", "True"])
    overrides = os.environ.get("BCT_OVERRIDES")
    return f"BCT_OVERRIDES={shlex.quote(overrides)} {command}" if overrides else command
