"""Models that were written and loaded for inference, as ComfyUI's are, made fit for a backward pass.

Autograd refuses to save a tensor made in inference mode. It marks tensors, not memory: a new tensor over the same
memory is an ordinary one. So nothing is copied, and afterwards the module holds its own tensors again.

Transformers add to their residual stream in place (``x += ...``) after a norm has saved it. So norms are given a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor, nn


def alias(tensor: Tensor) -> Tensor:
    """An ordinary tensor over the memory of ``tensor``; itself where it is one. Call it outside inference mode."""
    if not tensor.is_inference() or isinstance(tensor, QuantizedTensor):
        return tensor
    out = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return out.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


@contextmanager
def ordinary(module: nn.Module) -> Iterator[None]:
    """Inside it, with inference mode left, every parameter and buffer of ``module`` is an ordinary frozen tensor.

    Quantized weights stay as they are: linears that hold one never save it (training/adapters.py).
    """
    with torch.inference_mode(False), torch.enable_grad():
        changed = []
        hooks = [m.register_forward_pre_hook(_copied) for m in module.modules() if hasattr(m, "normalized_shape")]
        try:
            for part in module.modules():
                for table in (part._parameters, part._buffers):
                    for name, value in table.items():
                        if value is None or isinstance(value, QuantizedTensor):
                            continue
                        changed.append((table, name, value))
                        table[name] = _frozen(value)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for table, name, value in changed:
                table[name] = value


def _frozen(value: Tensor) -> Tensor:
    plain = alias(value.detach())
    return nn.Parameter(plain, requires_grad=False) if isinstance(value, nn.Parameter) else plain


def _copied(_norm: nn.Module, inputs: tuple) -> tuple:
    return (inputs[0].clone() if inputs[0].requires_grad else inputs[0], *inputs[1:])
