"""Run a function on several ranks, each a process of its own with a gloo process group."""

import multiprocessing
import os
import pathlib
import socket
import tempfile
import time
import traceback
from multiprocessing.connection import wait

import torch

# The server process imports these once; ranks are forked from it and start in a fraction of a second. It runs no
# tensor code, so forking it is safe where forking pytest, with its OpenMP and autograd threads, would not be.
# (torch._dynamo: the first optimiser imports it, a second of each rank's time.)
PRELOAD = ["torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo", "numpy", "pytest", "engine.trainer"]


def run_ranks(fn, world_size, *args, timeout=120, env=None):
    """`fn(*args)` on `world_size` ranks of a gloo group; returns the list of their results in rank order.

    fn: importable by name (module level); args: picklable. Results are of tensors, numbers, strings, None, and lists,
    tuples and dicts of them. The ranks see this process's environment, with RANK, WORLD_SIZE and LOCAL_RANK set, but no
    GPU (CUDA_VISIBLE_DEVICES is empty), and `env` on top, and have one thread each. The first rank to fail or to exit
    ends them all: RuntimeError with its traceback. TimeoutError after `timeout` seconds. Nothing is left running.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **(env or {})}
        ranks = [
            context.Process(target=_rank_main, args=(folder, rank, world_size, environment, fn, args))
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            _wait(ranks, folder, time.monotonic() + timeout, fn)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(os.path.join(folder, f"result{rank}.pt"), weights_only=True) for rank in range(world_size)]


def _wait(ranks, folder, deadline, fn):
    """Return when all ranks have ended well; raise for the first that has not, or at the deadline."""
    running = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while running:
        ended = wait(list(running), timeout=max(0, deadline - time.monotonic()))
        if not ended:
            raise TimeoutError(f"ranks {sorted(running.values())} of {fn.__name__} did not end in time")
        failed = []
        for rank in sorted(running.pop(sentinel) for sentinel in ended):
            ranks[rank].join()
            if ranks[rank].exitcode != 0:
                failed.append(rank)
        if failed:
            # Others may have failed in turn, of a closed connection: whoever wrote first comes first.
            reports = sorted(pathlib.Path(folder).glob("error*.txt"), key=lambda path: path.stat().st_mtime_ns)
            text = "\n".join(f"{path.stem}:\n{path.read_text()}" for path in reports)
            raise RuntimeError(f"rank {failed[0]} of {fn.__name__}: exit code {ranks[failed[0]].exitcode}\n{text}")


def _rank_main(folder, rank, world_size, environment, fn, args):
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # works without a network
    torch.set_num_threads(1)
    try:
        store = torch.distributed.FileStore(os.path.join(folder, "store"), world_size)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        result = fn(*args)
        torch.save(result, os.path.join(folder, f"result{rank}.pt"))
        torch.distributed.barrier()  # nobody leaves while another still talks
        torch.distributed.destroy_process_group()
    except BaseException:
        temporary = os.path.join(folder, f"writing{rank}")
        pathlib.Path(temporary).write_text(traceback.format_exc())
        os.replace(temporary, os.path.join(folder, f"error{rank}.txt"))
        os._exit(1)  # a clean exit could wait for the other ranks
