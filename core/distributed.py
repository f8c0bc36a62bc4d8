"""Ranks, devices and the collectives that losses need.

Convention of the whole repo: a loss term is a scalar of the *global* batch. It has the same value on every rank,
and its gradient on a rank is the exact derivative with respect to that rank's tensors. Gradients of replicated
parameters are therefore *summed* over the ranks (see `engine.trainer`), never averaged, so that one rank and
many ranks with the same global batch take the same step.

Everything here also works in a single process, without a process group.
"""

import datetime
import functools
import glob
import os
import re
import warnings

import numpy as np
import torch
import torch.distributed as dist

from core.errors import warn
from core.scheduler import adopt_ranks


def init_distributed(timeout=30.0, backend=None):
    """Join the launcher's process group, if there is one. Returns `(rank, world_size, device)`.

    Ranks come from RANK/WORLD_SIZE/LOCAL_RANK, set by torchrun and torch.distributed.launch, or from Slurm's variables
    (core/scheduler.py); without them this is a single process. The device is `cuda:LOCAL_RANK` if torch can use the GPU
    (`default_device`), else `cpu`; the backend is nccl or gloo accordingly. timeout: minutes that a collective waits.
    """
    adopt_ranks()
    device = torch.device(default_device())
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise SystemExit(
                f"no GPU for LOCAL_RANK={device.index}: this machine has {torch.cuda.device_count()}; "
                f"start with --nproc_per_node={torch.cuda.device_count()}, under srun with --gpus-per-node in place of "
                "--gpus-per-task: every task must see all GPUs of its node"
            )
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout)
        dist.init_process_group(
            backend or ("nccl" if device.type == "cuda" else "gloo"),
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
            **_store_after_restart(timeout),
        )
    return rank(), world_size(), device


def default_device():
    """`"cuda"` if torch can use this machine's GPU, else `"cpu"`; warns once of a GPU that it cannot use."""
    if gpu_problem():
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def gpu_problem():
    """Why torch cannot use this machine's GPU, in one line, logged once; None if it can, or if there is no GPU.

    A GPU hidden by CUDA_VISIBLE_DEVICES counts as none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on every rank
        reason = _without_kernels() if torch.cuda.is_available() else _without_driver()
    if reason is None:
        return None
    reason += "; see docs/troubleshooting.md, or hide the GPU with CUDA_VISIBLE_DEVICES=-1"
    warn("running on the CPU: %s", reason)
    return reason


def _without_driver():
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    if hidden == "" or hidden.startswith("-1") or not glob.glob("/dev/nvidia[0-9]*"):
        return None
    try:
        torch.cuda.init()
        said = "no device is available"
    except (AssertionError, RuntimeError) as error:  # torch without CUDA, or the driver
        said = str(error).partition(". ")[0]
    return f"torch {torch.__version__} cannot use this machine's GPU ({said})"


def _without_kernels():
    card, built = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(built)):
        version = int(major), int(minor)
        # Machine code runs on cards of its major version from its minor one on, PTX on all newer ones.
        if version <= card and (kind == "compute" or version[0] == card[0]):
            return None
    if torch.version.cuda is None:  # ROCm names its cards otherwise
        return None
    return (
        f"torch {torch.__version__} is built for {' '.join(built)}, not for this machine's "
        f"{torch.cuda.get_device_name()} (sm_{card[0]}{card[1]})"
    )


def _store_after_restart(timeout):
    """Extra arguments of `init_process_group` after a restart by `torchrun --max-restarts`.

    With --master_port torchrun's store outlives the attempt and still has its ranks' addresses; with torch 2.15 the
    next attempt would use them. On several machines --rdzv_backend=c10d creates a new store for each attempt.
    """
    attempt, ranks = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ["WORLD_SIZE"]
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt == "0" or not agent or os.environ.get("LOCAL_WORLD_SIZE") != ranks:
        return {}
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, int(ranks), is_master=False, timeout=timeout)
    return {
        "store": dist.PrefixStore(f"attempt_{attempt}", store),
        "rank": int(os.environ["RANK"]),
        "world_size": int(ranks),
    }


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def barrier():
    if world_size() > 1:
        dist.barrier()


def shutdown():
    if dist.is_initialized():
        dist.destroy_process_group()


def to_device(tensor, device):
    """`tensor` on `device`. From the CPU to CUDA through pinned memory: a plain `.to(device)` would make the host wait
    for all work queued on the device.
    """
    if tensor.is_cuda or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def rows_of_rank(total, rank, world_size):
    """`(start, stop)` of the contiguous share of `total` rows that `rank` owns; shares differ by at most one row."""
    size, rest = divmod(total, world_size)
    start = rank * size + min(rank, rest)
    return start, start + size + (rank < rest)


def all_reduce_(tensor, op=dist.ReduceOp.SUM):
    """In-place reduction over the ranks; outside autograd."""
    if world_size() > 1:
        dist.all_reduce(tensor, op)
    return tensor


def sum_over_ranks_(tensors):
    """In-place sums over the ranks of tensors of one type and device, by one collective; outside autograd."""
    if world_size() > 1 and tensors:
        whole = all_reduce_(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def sum_of_ranks(array):
    """The sum over the ranks of a NumPy array, on all of them."""
    return array if world_size() == 1 else all_reduce_(_on_their_device(array)).cpu().numpy()


def gather_arrays(array):
    """The ranks' NumPy arrays [n, …], n each rank's own, one after the other: on rank 0, None on the others."""
    if world_size() == 1:
        return array
    parts = []
    for source, count in enumerate(gather_objects(len(array))):  # one at a time: the others need not have room for all
        mine = array if source == rank() else np.empty((count, *array.shape[1:]), array.dtype)
        part = broadcast_(_on_their_device(mine), source)
        parts.append(part.cpu().numpy() if is_main() else None)
    return np.concatenate(parts) if is_main() else None


def _on_their_device(array):
    """A copy, on the device of the ranks' collectives."""
    return torch.from_numpy(np.array(array)).to("cuda" if dist.get_backend() == "nccl" else "cpu")


def broadcast_(tensor, source=0):
    """Overwrite `tensor` on every rank with rank `source`'s; outside autograd."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def broadcast_buffers(module, source=0):
    """Copy rank `source`'s buffers of `module` to all ranks: in training each has its own BatchNorm statistics."""
    for buffer in module.buffers():
        broadcast_(buffer, source)


def gather(tensor):
    """Concatenate equally shaped tensors of all ranks in rank order, without gradient: [B, ...] -> [world·B, ...]."""
    tensor = tensor.detach().contiguous()
    if world_size() == 1:
        return tensor
    whole = tensor.new_empty((world_size() * len(tensor), *tensor.shape[1:]))
    dist.all_gather(list(whole.chunk(world_size())), tensor)  # into views of `whole`, no concatenation
    return whole


def gather_objects(value):
    """`[rank 0's value, rank 1's, ...]` on every rank; `value` must be picklable."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        ctx.rows = len(tensor)
        return gather(tensor)

    @staticmethod
    def backward(ctx, grad):
        # Each rank has the derivative of its share of the loss with respect to *all* rows; the derivative with
        # respect to my rows is their sum. (A reduce-scatter would do, but gloo has none in older torch versions.)
        grad = all_reduce_(grad.contiguous().clone())
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_with_grad(tensor):
    """As `gather`, with gradient: the backward sums all ranks' gradients of my rows.

    For losses in which each rank does a *different share* of the work on the gathered rows (class shards).
    A loss that every rank computes in full from the gathered rows would be counted `world_size` times.
    """
    return _GatherWithGrad.apply(tensor) if world_size() > 1 else tensor


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return all_reduce_(tensor.detach().clone())

    @staticmethod
    def backward(ctx, grad):
        return grad


def sum_over_ranks(tensor):
    """Sum of a tensor over the ranks, the same on all of them.

    The gradient passes through unchanged: every rank computes the same function of the sum, so the incoming gradient
    is already the whole derivative (all-reducing it again would count it `world_size` times).
    """
    return _SumOverRanks.apply(tensor) if world_size() > 1 else tensor


def mean_of_counted(total, number):
    """Mean over those rows of the global batch that count, from each rank's sum of them and their number.

    total: a scalar, or several sums of the same rows, whose means are added. number: 0-d integer tensor; ranks may have
    different ones. The same on every rank, with the exact gradient of `total`; 0 if no row counts. If all do, this is
    `global_mean` of the rank's mean, bit for bit.
    """
    everywhere = all_reduce_(number.clone())
    share = number.to(total.dtype) * world_size() / everywhere.clamp(min=1)
    return global_mean((total / number.clamp(min=1) * share).sum())


def global_mean(value):
    """Mean over the ranks of a scalar that each computed on its own, equally large, part of the batch.

    The same on every rank; its gradient with respect to this rank's value is 1/world_size, as for a mean over the
    global batch.
    """
    return sum_over_ranks(value / world_size())
