"""The tensors of tests/pretend_cuda.py, and a record of the operations on them."""

import collections
import pathlib
import sys
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

ROOT = str(pathlib.Path(__file__).resolve().parents[1])
OWN = {__file__, str(pathlib.Path(__file__).with_name("pretend_cuda.py"))}
CUDA = torch.device("cuda", 0)
GARBAGE = -77  # what a copy holds that has not arrived
aten = torch.ops.aten
# Operations whose result, or its shape, the host must know.
WAITS = (
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim"),
    *("aten::_linalg_check_errors", "aten::equal"),
)
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# A GPU adds up half precision products in float32; the CPU's own float16 convolution is a hundred times slower.
PRODUCTS = {aten.convolution.default, aten.convolution_backward.default, aten.mm.default, aten.addmm.default}
tensor_to = torch.Tensor.to
current = []  # the Watch in force


def is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


def inner_of(value):
    return value.inner if isinstance(value, DeviceTensor) else value


def _rounded_once(func, args):
    """A product of half precision tensors by way of float32; of other tensors as it is."""
    dtype = next(arg.dtype for arg in args if isinstance(arg, torch.Tensor))
    if dtype not in (torch.float16, torch.bfloat16):
        return func(*args)
    out = func(*(arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args))
    return tree_map(lambda tensor: tensor if tensor is None else tensor.to(dtype), out)


class DeviceTensor(torch.Tensor):
    """Says that it is on cuda:0. To C++ it is a CPU tensor without memory; `inner` has the values."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        assert type(inner) is torch.Tensor, type(inner)
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, device="cpu", requires_grad=requires_grad, **layout
        )
        self.inner = inner.detach()
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return current[-1].run(func, args, kwargs or {})

    def get_device(self):
        return 0

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def is_pinned(self, *args):
        return False

    def pin_memory(self, *args):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor', only dense CPU tensors can be pinned")

    def __repr__(self):
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self):
        return self.cpu().tolist()

    def cpu(self, memory_format=torch.preserve_format):
        return self.to("cpu")

    def to(self, *args, **kwargs):
        """C++ takes the tensor for one of the CPU, and backward formulas say so too: only here is the host meant."""
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or is_cuda(device):
            layout = {"memory_format": memory_format} if memory_format else {}
            return tensor_to(self, dtype=dtype or self.dtype, copy=copy, **layout)
        return current[-1].to_host(self.inner, dtype or self.dtype, non_blocking)

    def record_stream(self, stream):
        pass

    def __deepcopy__(self, memo):
        new = DeviceTensor(self.inner.clone(), self.requires_grad)
        return torch.nn.Parameter(new, self.requires_grad) if isinstance(self, torch.nn.Parameter) else new


class Place(NamedTuple):
    """Where the host waited: what for, and the functions of the repo that were being run, innermost first."""

    what: str
    stack: tuple  # of "file:function"
    line: int


class Watch(TorchDispatchMode):
    """Runs every operation on the values of device tensors; waits: Counter of the Places where the host waited."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()
        self.operations = 0
        self.backward = False  # within it formulas make tensors that name no device
        self.copies = 0  # non-blocking ones begun so far
        self.to_arrive, self.to_read = [], []  # (number, target, values), (number, source, values then)
        self.pinned = {}

    def wait(self, what, everything=True):
        stack, line, frame = [], 0, sys._getframe(1)
        while frame is not None:
            path = frame.f_code.co_filename
            if path.startswith(ROOT) and path not in OWN and "/.venv/" not in path:
                line = line or frame.f_lineno
                stack.append(f"{path[len(ROOT) + 1 :]}:{frame.f_code.co_name}")
            frame = frame.f_back
        self.waits[Place(what, tuple(stack), line)] += 1
        if everything:
            self.complete(self.copies)

    def complete(self, until):
        """The device has come to the copy of number `until`."""
        for number, target, values in self.to_arrive:
            if number <= until:
                target.copy_(values)
        for number, source, then in self.to_read:
            if number <= until and not torch.equal(source, then):
                raise AssertionError(f"pinned memory {list(source.shape)} changed before its copy to the device")
        self.to_arrive = [copy for copy in self.to_arrive if copy[0] > until]
        self.to_read = [copy for copy in self.to_read if copy[0] > until]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
        if not on_device and not is_cuda(kwargs.get("device")) and not (self.backward and not leaves):
            return func(*args, **kwargs)
        self.operations += 1
        if func is aten._to_copy.default:
            return self.to_copy(args[0], kwargs)
        if func is aten.copy_.default:
            return self.copy_(*args, **kwargs)
        self.check(func, args, leaves, on_device)

        known = {id(tensor.inner): tensor for tensor in on_device}
        args, kwargs = tree_map(inner_of, (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if hasattr(kwargs.get("generator"), "real"):
            kwargs["generator"] = kwargs["generator"].real
        out = _rounded_once(func, args) if func in PRODUCTS and not kwargs else func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return out
        return tree_map(lambda t: known.get(id(t), DeviceTensor(t)) if type(t) is torch.Tensor else t, out)

    def check(self, func, args, leaves, on_device):
        """Note an operation that makes the host wait; raise for tensors of both devices (numbers may be of the CPU)."""
        if func.name().startswith(WAITS):
            self.wait(func.name().split(".")[0])
        if func in INDEXING:
            index = [tensor for tensor in args[1] if tensor is not None]
            if any(tensor.dtype in (torch.bool, torch.uint8) for tensor in index):
                self.wait("index by mask")
            if not all(isinstance(tensor, DeviceTensor) for tensor in index):
                self.wait("index on the CPU")
        elif on_device and any(not isinstance(tensor, DeviceTensor) and tensor.dim() for tensor in leaves):
            raise RuntimeError(f"{func.name()}: Expected all tensors to be on the same device, cuda:0 and cpu")

    def to_host(self, inner, dtype, non_blocking):
        with _disable_current_modes():
            values = inner.to(dtype, copy=True)
            if not non_blocking:
                self.wait("copy to the host")
                return values
            target = torch.full_like(values, GARBAGE if values.dtype != torch.bool else 0)
        self.copies += 1
        self.to_arrive.append((self.copies, target, values))
        return target

    def to_copy(self, source, kwargs):
        plain = {key: kwargs[key] for key in kwargs.keys() - {"non_blocking", "pin_memory", "device"}}
        out = DeviceTensor(aten._to_copy.default(inner_of(source), **plain))
        if isinstance(source, DeviceTensor) or not source.dim():
            return out
        if source.untyped_storage()._cdata not in self.pinned:
            self.wait("copy to the device from pageable memory", everything=False)
        elif not kwargs.get("non_blocking"):
            self.wait("blocking copy to the device", everything=False)
        else:
            self.copies += 1
            self.to_read.append((self.copies, source, source.clone()))
        return out

    def copy_(self, target, source, non_blocking=False):
        if not isinstance(target, DeviceTensor):
            self.wait("copy_ to the host")
        elif not isinstance(source, DeviceTensor) and source.dim():
            self.wait("copy_ to the device", everything=False)
        inner_of(target).copy_(inner_of(source))
        return target

    def pin(self, tensor):
        """A pinned copy; it is kept, so that its address stands for it alone."""
        if tensor.untyped_storage()._cdata not in self.pinned:
            tensor = tensor.clone()
            self.pinned[tensor.untyped_storage()._cdata] = tensor
        return tensor
