"""What one evaluation of a model takes, found without running it: FLOPs, and the most bytes live at once.

The model and its inputs are on the meta device: every operation runs, nothing is computed. FLOPs are torch's own
count (`torch.utils.flop_counter`). Bytes are those of every tensor made and not yet freed, which in eager inference are
freed where real ones would be; a real CPU run gives the same number to the byte (tests/profiling/test_work.py).
What it cannot know is what kernels and the allocator add: that is fitted from measured runs (`calibrate`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

FUSED = "fused"  # flash, memory-efficient, xformers, sage: no score matrix is ever stored
MATRIX = "matrix"  # basic, split, sub-quadratic: scores and their softmax, (batch, heads, tokens, tokens) each
KINDS = (FUSED, MATRIX)


@dataclass(frozen=True)
class Work:
    """``flops`` of one evaluation; ``layers``: name of each linear layer -> its share; ``live``: bytes of tensors at
    the peak, weights and inputs not counted.
    """

    flops: int
    live: int
    layers: dict[str, int] = field(default_factory=dict, hash=False)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active and still alive: now in ``live``, at most in ``peak``. A
    quantized tensor's product counts as one kernel: its output, not what a CPU reference unpacks inside it.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # A view or an in-place result shares memory that was there before, which is not new.
        before = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **kwargs)
        for storage in _storages(out):
            if storage._cdata not in before:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        n = storage.nbytes()
        self._known.add(key)
        self.live += n
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, n)

    def _drop(self, key: int, n: int) -> None:
        self._known.discard(key)
        self.live -= n


def _storages(tree) -> list[torch.UntypedStorage]:
    """The storage of each plain tensor in ``tree``; a wrapper around several tensors has none of its own."""
    return [t.untyped_storage() for t in tree_leaves(tree) if type(t) in (torch.Tensor, nn.Parameter)]


class Attention(TorchFunctionMode):
    """F.scaled_dot_product_attention as one kernel (fused) or with its scores stored (matrix): on the meta device torch
    would choose by rules of its own. Masks are left out: they change neither count.
    """

    def __init__(self, kind: str):
        super().__init__()
        self._kind = kind

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (*args, *(kwargs[n] for n in ("query", "key", "value") if n in kwargs))[:3]
        if k.shape[-3] != q.shape[-3]:  # grouped queries: kernels read one key for several heads
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        if self._kind == FUSED:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        scores = torch.softmax(torch.matmul(q, k.transpose(-1, -2)), -1)
        return torch.matmul(scores, v)


def simulate(model: nn.Module, call: Callable[[], object], attention: str = FUSED) -> Work:
    """What ``call()`` takes, one evaluation of ``model``, whose parameters and inputs are on the meta device.

    ``attention``: fused or matrix. Raises ValueError for another, or when the model is not on the meta device.
    """
    if attention not in KINDS:
        raise ValueError(f"attention is {' or '.join(KINDS)}, not {attention!r}")
    if any(not p.is_meta for p in model.parameters()):
        raise ValueError("a simulated model must be on the meta device: this one would really run")
    counter, live = FlopCounterMode(display=False), LiveBytes()
    layers: dict[str, int] = {}
    hooks = [m.register_forward_hook(_counting(name, layers)) for name, m in linears(model)]
    try:
        with torch.inference_mode(), Attention(attention), counter, live:
            out = call()
    finally:
        for hook in hooks:
            hook.remove()
    peak = live.peak
    del out
    return Work(counter.get_total_flops(), peak, layers)


def linears(model: nn.Module):
    """(dotted name, module) of every linear-like module: ComfyUI's are not all nn.Linear."""
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "in_features")]


def _counting(name: str, into: dict[str, int]):
    def hook(module, args, out):
        into[name] = into.get(name, 0) + 2 * out.numel() * module.in_features

    return hook


def measure(call: Callable[[], object]) -> int:
    """The most bytes of tensors live at once while ``call()`` really runs: what `simulate` predicts. Slows it down."""
    with LiveBytes() as live:
        out = call()
    del out
    return live.peak
