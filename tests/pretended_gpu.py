"""A GPU to test with where there is none: tensors that say "cuda", hold real numbers, and refuse to meet the CPU's.

PyTorch's own FakeTensorMode does the same without numbers, so nothing that looks at one (`if error < best`, `.item()`)
runs in it. Here whole jobs do: calibration, training, conversion. What a real GPU does besides (kernels, streams,
memory) is not tried.

    with pretended_gpu.on() as log:       # log.syncs: how often a number was read or sent, which makes a real GPU wait
        layer.to("cuda")(x)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
ACROSS = {aten._to_copy.default, aten.copy_.default, aten._has_compatible_shallow_copy_type.default}
SYNCS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}


@dataclass
class Log:
    syncs: int = 0
    mixes: list[str] = field(default_factory=list)


_current = [Log()]


class DevicesMix(RuntimeError):
    """What a real GPU says: "Expected all tensors to be on the same device"."""


class OnGPU(torch.Tensor):
    """A tensor of the CPU, ``inner``, that says it is on the GPU. To PyTorch's C++ it is on "meta", as FakeTensor is:
    a build without CUDA ends the process when its autograd hears of "cuda".
    """

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta",
        )  # fmt: skip
        made.inner = inner
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def __repr__(self):
        return f"OnGPU({self.inner})"

    def tolist(self):
        return self.detach().cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, types, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Makes what is made on the GPU out of nothing, or of tensors of the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, types, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """`.to("cuda")`: autograd would ask PyTorch's C++ for the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return _up(args[0])
        if func is torch.Tensor.to and any(_is_gpu(a) for a in (*args[1:], *kwargs.values())):
            moved = _up(args[0])
            dtype = next((a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.dtype)), None)
            return moved if dtype is None else moved.to(dtype)
        return func(*args, **kwargs)


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return OnGPU(x.detach().clone())

    @staticmethod
    def backward(ctx, gradient):
        return gradient.inner


def _tensor(data, *, device=None, make=torch.tensor, **kwargs):
    """`torch.tensor`, which fills the device's memory without asking anybody."""
    made = make(data, **kwargs)
    return _up(made) if _is_gpu(device) else made if device is None else made.to(device)


def _up(x):
    if isinstance(x, OnGPU):
        return x
    if isinstance(x, QuantizedTensor):
        p = x._params
        fields = {n: _up(getattr(p, n)) for n in p._tensor_fields()}
        return QuantizedTensor(_up(x._qdata), x._layout_cls, dataclasses.replace(p, **fields))
    _current[0].syncs += 1
    return _Up.apply(x)


def _is_gpu(value) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value[:4] == "cuda"
    )


def _run(func, types, args, kwargs):
    if any(t not in (OnGPU, torch.Tensor, torch.nn.Parameter) for t in types):
        return NotImplemented  # QuantizedTensor knows what to do, and comes back with plain tensors
    leaves = tree_leaves((args, kwargs))
    ours = [t for t in leaves if isinstance(t, OnGPU)]
    others = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, OnGPU) and t.dim()]
    if func not in ACROSS and ours and others:
        what = f"{func}: {[tuple(t.shape) for t in ours]} on the GPU, {[tuple(t.shape) for t in others]} on the CPU"
        _current[0].mixes.append(what)
        raise DevicesMix(what)
    _current[0].syncs += bool(ours) and func in SYNCS
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if func is aten.copy_.default:
        return args[0]
    device = kwargs.get("device")
    on_gpu = bool(ours) if device is None else torch.device(device).type != "cpu"
    return tree_map(lambda t: _outer(t, ours), out) if on_gpu else out


def _inner(value):
    if isinstance(value, OnGPU):
        return value.inner
    return CPU if isinstance(value, torch.device) else value


def _outer(value, ours: list[OnGPU]):
    if not isinstance(value, torch.Tensor):
        return value
    same = [t for t in ours if t.inner is value]
    return same[0] if same else OnGPU(value)


@contextmanager
def on() -> Iterator[Log]:
    """Within, device "cuda" is there."""
    _current[:] = [log := Log()]
    rng = {
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    nothing = {
        n: lambda *_: None for n in ("_lazy_init", "synchronize", "empty_cache", "manual_seed", "manual_seed_all")
    }
    nothing["get_device_capability"] = lambda *_: (8, 6)
    with _Mode(), _Moves(), patch.multiple(torch.cuda, **rng, **nothing), patch.object(torch, "tensor", _tensor):
        yield log
