"""Run a function on several ranks, each a process of its own with a gloo process group; or a command with its children.

Nothing is left running. Nothing here measures time: HANGS is met only by what hangs, however loaded the machine is.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time
import traceback
from multiprocessing.connection import wait

import torch

HANGS = 1800  # seconds; on an idle machine the longest, the whole flow of the README, takes two minutes

# The server process imports these once; ranks are forked from it and start in a fraction of a second. It runs no
# tensor code, so forking it is safe where forking pytest, with its OpenMP and autograd threads, would not be.
# (torch._dynamo: the first optimiser imports it, a second of each rank's time.)
PRELOAD = ["torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo", "numpy", "pytest", "engine.trainer"]
PRELOAD += ["tools.ijbc_eval.ijbc_eval"]


def run_ranks(fn, world_size, *args, env=None):
    """`fn(*args)` on `world_size` ranks of a gloo group; returns the list of their results in rank order.

    fn: importable by name (module level); args: picklable. Results are of tensors, numbers, strings, None, and lists,
    tuples and dicts of them. The ranks see this process's environment, with RANK, WORLD_SIZE and LOCAL_RANK set, but no
    GPU (CUDA_VISIBLE_DEVICES is empty), and `env` on top, and have one thread each. The first rank to fail or to exit
    ends them all: RuntimeError with its traceback. TimeoutError, with their stacks, if they hang.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **(env or {})}
        with started(_rank_main, world_size, folder, environment, fn, args) as ranks:
            try:
                for rank in as_they_end(ranks):
                    if ranks[rank].exitcode != 0:
                        raise RuntimeError(f"rank {rank} of {fn.__name__}: exit code {ranks[rank].exitcode}")
            except (RuntimeError, TimeoutError) as error:
                # Others may have failed in turn, of a closed connection: whoever wrote first comes first.
                reports = sorted(pathlib.Path(folder).glob("error*.txt"), key=lambda path: path.stat().st_mtime_ns)
                told = [f"{path.stem}:\n{path.read_text().partition('Extension modules:')[0]}" for path in reports]
                raise type(error)("\n".join([str(error), *told])) from None
        return [torch.load(os.path.join(folder, f"result{rank}.pt"), weights_only=True) for rank in range(world_size)]


@contextlib.contextmanager
def started(main, world_size, *args, end=multiprocessing.process.BaseProcess.kill):
    """Processes that run `main(rank, world_size, *args)`; at the end of the block each is given to `end`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ranks = [context.Process(target=main, args=(rank, world_size, *args)) for rank in range(world_size)]
    try:
        for process in ranks:
            process.start()
        yield ranks
    finally:
        for process in ranks:
            if process.pid is not None:
                end(process)
                process.join()


def as_they_end(processes):
    """Yield the number of each process once it has ended.

    Those that run after HANGS seconds get SIGABRT, on which faulthandler prints where they are: TimeoutError.
    """
    running = {process.sentinel: number for number, process in enumerate(processes)}
    deadline = time.monotonic() + HANGS
    while running:
        ended = wait(list(running), timeout=max(0, deadline - time.monotonic()))
        if not ended:
            for number in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(processes[number].pid, signal.SIGABRT)
                processes[number].join(10)
            raise TimeoutError(f"ranks {sorted(running.values())} still run after {HANGS} s")
        for number in sorted(running.pop(sentinel) for sentinel in ended):
            processes[number].join()
            yield number


def join_group(rank, world_size, store):
    """Make this process a rank of a gloo group that meets in the file `store`."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # works without a network
    store = torch.distributed.FileStore(str(store), world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)


def _rank_main(rank, world_size, folder, environment, fn, args):
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    report = pathlib.Path(folder, f"error{rank}.txt")
    with open(report, "w") as file:
        faulthandler.enable(file)
        try:
            join_group(rank, world_size, pathlib.Path(folder, "store"))
            result = fn(*args)
            torch.save(result, os.path.join(folder, f"result{rank}.pt"))
            torch.distributed.barrier()  # nobody leaves while another still talks
            torch.distributed.destroy_process_group()
        except BaseException:
            file.write(traceback.format_exc())
            file.flush()
            os._exit(1)  # a clean exit could wait for the other ranks


def run_session(command, **options):
    """subprocess.run of a command that starts others: they end with it, also where it does not end in HANGS seconds.

    options: of subprocess.Popen. Output is captured as text.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes, **options) as process:
        try:
            printed, errors = process.communicate(timeout=HANGS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, printed, errors)
