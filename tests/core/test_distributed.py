"""Collectives on gloo ranks against the same computation in one process."""

import glob
import logging
import os
import re

import numpy as np
import pytest
import torch

from core import distributed
from core.distributed import to_device
from tests.ranks import run_ranks


def whole(rows=6, columns=3):
    return torch.arange(rows * columns, dtype=torch.float64).reshape(rows, columns).sin()


def share(tensor):
    rows = len(tensor) // distributed.world_size()
    return tensor[distributed.rank() * rows : (distributed.rank() + 1) * rows].clone()


def gather_on_rank():
    labels = share(torch.arange(6))
    mine = share(whole()).requires_grad_()
    gathered = distributed.gather_with_grad(mine)
    # Each rank uses its own columns of the gathered rows, as a class shard does.
    columns = list(range(distributed.rank(), 3, distributed.world_size()))
    (gathered[:, columns] ** 3).sum().backward()
    plain = distributed.gather(mine)
    return gathered.detach(), mine.grad, distributed.gather(labels), plain, plain.requires_grad


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gather_and_its_gradient(world_size):
    for rank, (gathered, grad, labels, plain, requires_grad) in enumerate(run_ranks(gather_on_rank, world_size)):
        assert torch.equal(gathered, whole()) and torch.equal(plain, whole()) and not requires_grad
        assert labels.tolist() == list(range(6))
        torch.testing.assert_close(grad, 3 * whole().chunk(world_size)[rank] ** 2)


def sums_on_rank():
    value = torch.tensor(float(distributed.rank() + 1), dtype=torch.float64, requires_grad=True)
    distributed.sum_over_ranks(value).square().backward()
    squared, value.grad = value.grad.clone(), None
    mean = distributed.global_mean(value)
    mean.backward()
    ranks = (distributed.rank(), distributed.world_size(), distributed.is_main())
    return squared, mean.detach(), value.grad, ranks


@pytest.mark.parametrize("world_size", [1, 3])
def test_sum_and_mean_with_gradients(world_size):
    total = world_size * (world_size + 1) / 2
    for rank, (squared, mean, grad, ranks) in enumerate(run_ranks(sums_on_rank, world_size)):
        assert squared.item() == 2 * total  # d(sum^2)/d(share), counted once
        assert mean.item() == pytest.approx(total / world_size) and grad.item() == pytest.approx(1 / world_size)
        assert ranks == (rank, world_size, rank == 0)


def test_single_process_without_a_group_passes_through():
    value = whole().requires_grad_()
    assert distributed.gather_with_grad(value) is value
    assert distributed.sum_over_ranks(value) is value
    assert torch.equal(distributed.gather(value), value) and not distributed.gather(value).requires_grad
    assert torch.equal(distributed.all_reduce_(value.detach().clone()), value)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    distributed.shutdown()


@pytest.mark.parametrize("total, world_size", [(10, 3), (7, 7), (2, 5), (0, 2), (12, 4)])
def test_rows_of_rank_cut_evenly_and_in_order(total, world_size):
    cuts = [distributed.rows_of_rank(total, rank, world_size) for rank in range(world_size)]
    assert [row for start, stop in cuts for row in range(start, stop)] == list(range(total))
    sizes = [stop - start for start, stop in cuts]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_init_distributed_without_a_launcher_is_a_single_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    rank, world_size, device = distributed.init_distributed()
    assert (rank, world_size) == (0, 1)
    assert device.type == "cpu"


@pytest.fixture
def gpu(monkeypatch):
    """Sets up a machine with a GPU: `gpu(**keys)` -> (default device, lines logged by two askings)."""

    def ask(driver=None, capability=(8, 6), built=("sm_80",), present=True, **environment):
        def init():
            raise RuntimeError(f"{driver} (found version 11040). Please update")

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for name, value in {
            "is_available": lambda: driver is None,
            "init": init,
            "get_device_capability": lambda: capability,
            "get_device_name": lambda: "A card",
            "get_arch_list": lambda: list(built),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/nvidia0"] if present else [])
        lines = []
        monkeypatch.setattr(logging.getLogger("bct"), "warning", lambda text, *args: lines.append(text % args))
        distributed.gpu_problem.cache_clear()
        return distributed.default_device(), distributed.default_device(), lines

    yield ask
    monkeypatch.undo()
    distributed.gpu_problem.cache_clear()


TOO_OLD = "The NVIDIA driver on your system is too old"


@pytest.mark.parametrize(
    "keys, said",
    [
        (
            {"driver": TOO_OLD},
            rf"running on the CPU: torch \S+ cannot use this machine's GPU \({TOO_OLD}.*docs/trouble",
        ),
        ({"capability": (6, 1)}, r"is built for sm_80, not for this machine's A card \(sm_61\); see docs/trouble"),
        ({"capability": (9, 0)}, "not for this machine's A card"),
        ({"capability": (12, 0), "built": ["sm_90a", "compute_121"]}, "not for this machine's A card"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_once(gpu, keys, said):
    first, second, lines = gpu(**keys)
    assert first == second == "cpu" and len(lines) == 1 and re.search(said, lines[0])
    assert gpu(**keys, RANK="1") == ("cpu", "cpu", [])  # rank 0 says it for all


@pytest.mark.parametrize(
    "device, keys",
    [
        ("cuda", {}),
        ("cuda", {"capability": (8, 0)}),
        ("cuda", {"capability": (12, 1), "built": ["sm_90", "sm_120"]}),
        ("cuda", {"capability": (13, 0), "built": ["sm_120", "compute_120"]}),
        ("cpu", {"driver": TOO_OLD, "CUDA_VISIBLE_DEVICES": ""}),
        ("cpu", {"driver": TOO_OLD, "CUDA_VISIBLE_DEVICES": "-1"}),
        ("cpu", {"driver": "Found no NVIDIA driver", "present": False}),
    ],
)
def test_otherwise_there_is_nothing_to_tell(gpu, device, keys):
    assert gpu(**keys) == (device, device, [])


def init_on_rank():
    rank, world_size, device = distributed.init_distributed()
    return rank, world_size, str(device), os.environ.get("FROM_THE_CALLER")


def test_init_distributed_takes_ranks_from_the_group():
    results = run_ranks(init_on_rank, 2, env={"FROM_THE_CALLER": "yes"})
    assert results == [(0, 2, "cpu", "yes"), (1, 2, "cpu", "yes")]


def fail_on_rank(which):
    if distributed.rank() == which:
        raise ValueError("told to fail")
    distributed.barrier()  # the others wait for it: must not hang the test


def test_a_failing_rank_ends_the_run_with_its_traceback():
    with pytest.raises(RuntimeError, match="(?s)rank.*ValueError: told to fail"):
        run_ranks(fail_on_rank, 2, 1)


class Recorded:
    """A fake CPU tensor that records calls."""

    is_cuda = False

    def __init__(self):
        self.calls = []

    def pin_memory(self):
        self.calls.append("pin_memory")
        return self

    def to(self, device, non_blocking=False):
        self.calls.append((str(device), non_blocking))
        return self


@pytest.mark.parametrize(
    "device, calls",
    [("cpu", [("cpu", False)]), ("cuda", ["pin_memory", ("cuda", True)]), ("cuda:3", ["pin_memory", ("cuda:3", True)])],
)
def test_copies_to_the_gpu_are_pinned_and_not_waited_for(device, calls):
    for form in (device, torch.device(device)):
        tensor = Recorded()
        assert to_device(tensor, form) is tensor and tensor.calls == calls


def arrays_on_rank():
    """Sums in one collective, of NumPy arrays, and arrays of different lengths one after the other."""
    mine = distributed.rank() + 1
    tensors = [torch.full((2, 3), float(mine)), torch.full((), 10.0 * mine), torch.arange(4.0).reshape(2, 2).T * mine]
    distributed.sum_over_ranks_(tensors)
    given = np.arange(3) * mine
    total = distributed.sum_of_ranks(given)
    assert given.tolist() == [0, mine, 2 * mine]
    rows = distributed.gather_arrays(np.full((mine, 2), mine, np.float32))
    return tensors, total.tolist(), None if rows is None else rows[:, 0].tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_arrays_and_several_tensors(ranks):
    total = ranks * (ranks + 1) / 2
    for rank, (tensors, summed, rows) in enumerate(run_ranks(arrays_on_rank, ranks)):
        expected = [torch.full((2, 3), total), torch.full((), 10 * total), torch.arange(4.0).reshape(2, 2).T * total]
        assert all(torch.equal(one, other) for one, other in zip(tensors, expected))
        assert summed == [0, total, 2 * total]
        assert rows == (None if rank else [float(one) for one in range(1, ranks + 1) for _ in range(one)])
