"""Ranks, devices and the few collectives that losses need.

Convention of the whole repo: a loss term is a scalar of the *global* batch. It has the same value on every rank,
and its gradient on a rank is the exact derivative with respect to that rank's tensors. Gradients of replicated
parameters are therefore *summed* over the ranks (see `engine.trainer`), never averaged, so that one rank and
many ranks with the same global batch take the same step.

Everything here also works in a single process without an initialised process group.
"""

import datetime
import functools
import glob
import logging
import os
import re
import warnings

import torch
import torch.distributed as dist


def init_distributed(backend=None, timeout_minutes=30):
    """Join the process group that the launcher describes in the environment, if there is one.

    Returns `(rank, world_size, device)`. Ranks come from RANK/WORLD_SIZE/LOCAL_RANK (torchrun and
    torch.distributed.launch both set them); without them this is a single process. The device is
    `cuda:LOCAL_RANK` where torch can use the GPU (`default_device`), else `cpu`; the backend is nccl or gloo.
    """
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "RANK" not in os.environ:
        raise SystemExit(
            f"Slurm started {os.environ['SLURM_STEP_NUM_TASKS']} tasks, but none knows its rank: each would be a run "
            "of its own. Have srun start torchrun, one task a machine (--ntasks-per-node=1)"
        )
    device = torch.device(default_device())
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise SystemExit(
                f"rank with LOCAL_RANK={device.index} has no GPU: this machine has {torch.cuda.device_count()}; "
                f"start with --nproc_per_node={torch.cuda.device_count()}"
            )
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        dist.init_process_group(
            backend or ("nccl" if device.type == "cuda" else "gloo"),
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
            **_store_after_restart(timeout),
        )
    return rank(), world_size(), device


def default_device():
    """ "cuda" where torch can use this machine's GPU, else "cpu"; a GPU that it cannot use is told once."""
    if gpu_problem():
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def gpu_problem():
    """Why torch cannot use the GPU of this machine, a line that is also logged; None where it can, or there is none.

    A GPU hidden by CUDA_VISIBLE_DEVICES counts as none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on every rank
        reason = _without_kernels() if torch.cuda.is_available() else _without_driver()
    if reason is None:
        return None
    reason += "; see docs/troubleshooting.md, or hide the GPU by CUDA_VISIBLE_DEVICES=-1"
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("bct").warning("running on the CPU: %s", reason)
    return reason


def _without_driver():
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    if hidden == "" or hidden.startswith("-1") or not glob.glob("/dev/nvidia[0-9]*"):
        return None
    try:
        torch.cuda.init()
        said = "no device is available"
    except (AssertionError, RuntimeError) as error:  # of a torch built without CUDA, and of the driver
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
    """What `init_process_group` takes beside the usual when `torchrun --max-restarts` has restarted this process.

    torchrun's store with --master_port outlives the attempt, and holds where its ranks listened; torch 2.15 has those
    of the next attempt look there. On several machines --rdzv_backend=c10d has a new store for each attempt.
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
    """A tensor on `device`; from the CPU to CUDA by pinned memory, so that the host does not wait for the device.

    A plain `.to(device)` would return only after all that is queued on the device before the copy.
    """
    if tensor.is_cuda or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def rows_of_rank(total, rank, world_size):
    """The contiguous share `(start, stop)` of `total` rows that `rank` owns: sizes differ by at most one, in order."""
    size, rest = divmod(total, world_size)
    start = rank * size + min(rank, rest)
    return start, start + size + (rank < rest)


def all_reduce_(tensor, op=dist.ReduceOp.SUM):
    """In-place reduction over the ranks; outside autograd."""
    if world_size() > 1:
        dist.all_reduce(tensor, op)
    return tensor


def broadcast_(tensor, source=0):
    """Overwrite `tensor` on every rank with that of rank `source`; outside autograd."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def broadcast_buffers(module, source=0):
    """Give every rank rank `source`'s buffers of `module`: BatchNorm's statistics are each rank's own in training."""
    for buffer in module.buffers():
        broadcast_(buffer, source)


def gather(tensor):
    """Concatenate equally shaped tensors of all ranks along dim 0, in rank order: [B, ...] -> [world·B, ...].

    No gradient. In a single process this is the tensor itself, detached.
    """
    tensor = tensor.detach().contiguous()
    if world_size() == 1:
        return tensor
    whole = tensor.new_empty((world_size() * len(tensor), *tensor.shape[1:]))
    dist.all_gather(list(whole.chunk(world_size())), tensor)  # into views of `whole`, no concatenation
    return whole


def gather_objects(value):
    """`[rank 0's value, rank 1's, ...]` on every rank, of anything that can be pickled."""
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
        # Each rank holds the derivative of its own share of the loss with respect to *all* rows;
        # the derivative with respect to my rows is the sum of everyone's.
        # (A reduce-scatter would say it more tightly, but gloo has none in the older torch versions.)
        grad = all_reduce_(grad.contiguous().clone())
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_with_grad(tensor):
    """As `gather`, with gradient: the backward sums what all ranks say about my rows.

    Meant for losses whose ranks each hold a *different share* of the work on the gathered rows (class shards).
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
    """Sum over the ranks of a tensor of which each rank holds a share; the result is the same everywhere.

    Its gradient is passed to the local share as it is: every rank computes the same function of the sum, so the
    incoming gradient is already the whole derivative (all-reducing it again would count it `world_size` times).
    """
    return _SumOverRanks.apply(tensor) if world_size() > 1 else tensor


def global_mean(value):
    """Mean over the ranks of a scalar that each rank computed on its own, equally large, part of the batch.

    The value is the same on every rank; the gradient reaching this rank's value is 1/world_size, as it must be
    for a mean over the global batch.
    """
    return sum_over_ranks(value / world_size())
