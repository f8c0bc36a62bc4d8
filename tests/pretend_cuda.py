"""A pretended CUDA for machines without a GPU: tensors that report `cuda:0` and hold CPU values.

    with pretend_cuda() as watch:
        Trainer(cfg).train()
    watch.waits             # Counter of the places where the host waited for the device

It fails as CUDA does on tensors of both devices in one operation, on `.numpy()` of a device tensor and on a CPU tensor
in a collective. It notes every operation that makes the host wait. A non-blocking copy to the host holds garbage until
an event recorded after it has been waited for; a pinned source that changes before its copy is done is an error.
torch.autocast("cuda") computes in half precision, by the CPU's lists of operations; torch.compile is not tried.

Not covered: sparse gradients (sampled classes), the order of streams, kernels that CUDA lacks, NCCL, speed, and DDP's
reducer.
"""

import contextlib
import sys

import torch
import torch._dynamo  # it and the next look at what is patched below
import torch.distributed as dist
import torch.distributed.tensor
import torch.utils.checkpoint
from torch.nn.parallel import DistributedDataParallel
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils._python_dispatch import _disable_current_modes

from tests.pretend_tensor import CUDA, DeviceTensor, Watch, current, inner_of, is_cuda, tensor_to

COLLECTIVES = (
    *("all_reduce", "broadcast", "all_gather", "all_gather_single", "all_gather_into_tensor"),
    *("reduce_scatter_single", "reduce_scatter_tensor"),
)


class Event:
    def __init__(self, *args, **kwargs):
        self.copies = None

    def record(self, stream=None):
        self.copies, self.operations = current[-1].copies, current[-1].operations

    def synchronize(self):
        if self.copies is None:
            raise RuntimeError("event was never recorded")
        if self.operations == current[-1].operations:
            current[-1].wait("event of the latest operation")
        current[-1].complete(self.copies)

    def wait(self, *args):
        pass

    def query(self):
        return False


class Stream:
    def __init__(self, *args, **kwargs):
        pass

    def record_event(self, event=None):
        event = event or Event()
        event.record()
        return event

    def wait_event(self, event):
        pass

    wait_stream = wait_event

    def synchronize(self):
        current[-1].wait("stream.synchronize")


_RealGenerator = torch.Generator


class Generator:
    """torch.Generator of the device; of the CPU it is torch's own."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls) if is_cuda(device) else _RealGenerator(device)

    def __init__(self, device):
        self.real, self.device = _RealGenerator(), CUDA

    def manual_seed(self, seed):
        self.real.manual_seed(seed)
        return self

    def get_state(self):
        return self.real.get_state()

    def set_state(self, state):
        self.real.set_state(state)


class Autocast(torch.autocast):
    def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.get_autocast_dtype("cuda")
        super().__init__(device_type, dtype, enabled, cache_enabled)


class SummingParallel(torch.nn.Module):
    """In the place of DistributedDataParallel, whose reducer wants memory: rank 0's weights, each gradient summed."""

    def __init__(self, module, **_):
        super().__init__()
        self.module, self.exchange = module, True
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, 0)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._sum)

    def _sum(self, parameter):
        if self.exchange:
            dist.all_reduce(parameter.grad)

    def forward(self, *args):
        return self.module(*args)

    def register_comm_hook(self, *args):
        pass

    @contextlib.contextmanager
    def no_sync(self):
        self.exchange = False
        yield
        self.exchange = True


def _map_tensors(change, state):
    """`state` with `change` made to its tensors, in dicts, lists and tuples at any depth."""
    if isinstance(state, torch.Tensor):
        return change(state)
    if isinstance(state, dict):
        return type(state)((key, _map_tensors(change, value)) for key, value in state.items())
    if isinstance(state, (list, tuple)):
        return type(state)(_map_tensors(change, value) for value in state)
    return state


def _patch_files(patch):
    save, load = torch.save, torch.load

    def plain(tensor):
        return tensor.inner.clone() if isinstance(tensor, DeviceTensor) else tensor

    def loaded(path, map_location=None, **kwargs):
        state = load(path, map_location="cpu", **kwargs)
        return _map_tensors(lambda t: DeviceTensor(t.detach()), state) if is_cuda(map_location) else state

    patch(torch, "save", lambda state, file, *args, **kwargs: save(_map_tensors(plain, state), file, *args, **kwargs))
    patch(torch, "load", loaded)


def _patch_collectives(patch):
    """gloo takes what the device tensors hold; a tensor of the CPU is refused, as NCCL does."""

    def device_alone(value):
        if isinstance(value, torch.Tensor) and not isinstance(value, DeviceTensor):
            raise RuntimeError("No backend type associated with device type cpu")
        return [device_alone(part) for part in value] if isinstance(value, (list, tuple)) else inner_of(value)

    def without_modes(real, convert):
        def call(*args, **kwargs):
            with _disable_current_modes():
                return real(*map(convert, args), **kwargs)

        return call

    for name in COLLECTIVES:
        if hasattr(dist, name):
            patch(dist, name, without_modes(getattr(dist, name), device_alone))
    patch(dist, "all_gather_object", without_modes(dist.all_gather_object, lambda value: value))
    patch(dist, "get_backend", lambda *args: "nccl")
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("DistributedDataParallel") is DistributedDataParallel:
            patch(module, "DistributedDataParallel", SummingParallel)


def _patch_tensors(patch, watch):
    backward, empty, rand = torch.Tensor.backward, torch.empty, torch.rand

    def to(self, *args, **kwargs):  # "cuda" without a number asks the driver for the current device
        args = [CUDA if isinstance(arg, (str, torch.device)) and is_cuda(arg) else arg for arg in args]
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CUDA
        return tensor_to(self, *args, **kwargs)

    def cuda(self, device=None, non_blocking=False):
        return self if isinstance(self, DeviceTensor) else self.to(CUDA, non_blocking=non_blocking)

    def noted_backward(self, *args, **kwargs):
        watch.backward = isinstance(self, DeviceTensor)
        try:
            return backward(self, *args, **kwargs)
        finally:
            watch.backward = False

    def rand_(*args, generator=None, device=None, **kwargs):
        if is_cuda(device):
            return DeviceTensor(rand(*args, generator=getattr(generator, "real", generator), **kwargs))
        return rand(*args, generator=generator, device=device, **kwargs)

    def empty_(*args, pin_memory=False, **kwargs):
        return watch.pin(empty(*args, **kwargs)) if pin_memory else empty(*args, **kwargs)

    patch(torch.Tensor, "to", to)
    patch(torch.Tensor, "cuda", cuda)
    patch(torch.Tensor, "pin_memory", lambda self, device=None: watch.pin(self))
    patch(torch.Tensor, "is_pinned", lambda self, *args: self.untyped_storage()._cdata in watch.pinned)
    patch(torch.Tensor, "backward", noted_backward)
    patch(torch, "empty", empty_)
    patch(torch, "rand", rand_)
    patch(torch, "Generator", Generator)
    patch(torch, "autocast", Autocast)


def _patch_device(patch):
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "a GPU that is not there",
        "get_arch_list": lambda: ["sm_90"],
        "set_device": lambda device: None,
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }.items():
        patch(torch.cuda, name, value)

    def grouped(lists, with_indices=False):
        """C++ calls the device of each group that of the CPU: say what its tensors say."""
        groups = _group_tensors_by_device_and_dtype(lists, with_indices)
        firsts = [next(t for tensors in group[0] for t in tensors if t is not None) for group in groups.values()]
        return {(first.device, dtype): group for first, ((_, dtype), group) in zip(firsts, groups.items())}

    for name in ("torch.utils._foreach_utils", "torch.optim.optimizer", "torch.nn.utils.clip_grad"):
        if hasattr(sys.modules[name], "_group_tensors_by_device_and_dtype"):
            patch(sys.modules[name], "_group_tensors_by_device_and_dtype", grouped)
    if hasattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check"):
        patch(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)


@contextlib.contextmanager
def pretend_cuda():
    """Within it torch has a CUDA device, and modules made there stay on it. Yields the Watch."""
    watch, saved = Watch(), []

    def patch(owner, name, value):
        saved.append((owner, name, owner.__dict__.get(name, getattr(owner, name))))
        setattr(owner, name, value)

    lift = torch._C._only_lift_cpu_tensors()
    try:
        for part in (_patch_device, _patch_collectives, _patch_files):
            part(patch)
        _patch_tensors(patch, watch)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes new parameters
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") by way of the CPU
        current.append(watch)
        with watch:
            yield watch
    finally:
        torch._C._set_only_lift_cpu_tensors(lift)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        current[:] = [other for other in current if other is not watch]
        for owner, name, value in reversed(saved):
            setattr(owner, name, value)
