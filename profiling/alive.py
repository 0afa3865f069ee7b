"""Tensor bytes that a module holds, and those alive at the worst moment of a computation, on any device.

A quantized tensor's product counts as one kernel: its output, not what a CPU reference unpacks inside it.
"""

from __future__ import annotations

import weakref

import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.base import get_layout_class
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """``peak``: bytes of tensors made inside; those that were there before do not count."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {place for place, _ in _storages((args, kwargs))}
        for place, storage in _storages(out):
            if place not in given:
                size = storage.nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, size)
        return out

    def _free(self, size: int) -> None:
        self.live -= size


def _storages(tree) -> list[tuple[int, torch.UntypedStorage]]:
    """(address, storage) of each plain tensor in ``tree``; a wrapper around several has none of its own."""
    plain = [t for t in tree_leaves(tree) if type(t) in (torch.Tensor, nn.Parameter)]
    found = [t.untyped_storage() for t in plain]
    return [(s.data_ptr(), s) for s in found]


def resident(module: nn.Module) -> int:
    """Bytes of everything that ``module`` holds, each storage once, quantized weights with all that belongs to them."""
    held: list[torch.Tensor] = []
    for p in (*module.parameters(), *module.buffers()):
        quantized = isinstance(p, QuantizedTensor)
        held += get_layout_class(p._layout_cls).state_dict_tensors(p._qdata, p._params).values() if quantized else [p]
    return sum({place: storage.nbytes() for place, storage in _storages(held)}.values())
