"""ComfyUI's own formats with a low-rank branch beside them: what a LoRA, or another pack's file, adds to such a layer.

    y = q(x pre_quant_scale) Wq^T + (x proj_down) proj_up^T + bias

    base             (N, K), a QuantizedTensor in the format's own layout: its codes are never rounded again
    proj_down        (K, R)
    proj_up          (N, R)
    input_scale      ()      optional (nvfp4, fp8)
    pre_quant_scale  (K,)    optional
    emulate          dequantize, because this machine has no kernel
    full_precision   dequantize, because the file asks for it

The branch sees the raw x. Source: ComfyUI's comfy/ops.py (mixed_precision_ops.Linear.forward), of which `base_linear`
is the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from comfy_kitchen.float_utils import from_blocked, to_blocked
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.base import get_layout_class
from torch import Tensor

from .core_formats import FORMATS, nvfp4_scale

SIDES = ("proj_down", "proj_up")  # in the compute dtype
TENSORS = (*SIDES, "input_scale", "pre_quant_scale")  # what may stand beside the base
# Layouts whose scales lie in cuBLAS's blocks: (parameter, columns that share a scale)
BLOCKED = {"TensorCoreNVFP4Layout": ("block_scale", 16), "TensorCoreMXFP8Layout": ("scale", 32)}
# Layouts whose product wants its input quantized first; the others quantize it themselves.
QUANTIZED_INPUT = tuple(f"TensorCore{name}Layout" for name in ("FP8", "FP8E4M3", "FP8E5M2", "MXFP8", "NVFP4"))


@dataclass(frozen=True)
class CoreLowRankWeight:
    """See the table above. Raises ValueError when shapes do not belong together."""

    base: QuantizedTensor
    proj_down: Tensor
    proj_up: Tensor
    input_scale: Tensor | None = None
    pre_quant_scale: Tensor | None = None
    emulate: bool = False
    full_precision: bool = False

    def __post_init__(self):
        n, k = self.shape
        for name, shape in (("proj_down", (k, self.rank)), ("proj_up", (n, self.rank)), ("pre_quant_scale", (k,))):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape} for N={n}, K={k}")

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.base.shape)

    @property
    def rank(self) -> int:
        return self.proj_down.shape[-1]

    def to(self, dtype: torch.dtype) -> CoreLowRankWeight:
        """The same weight with its branch in ``dtype``; codes and scales stay as they are."""
        return replace(self, base=recast(self.base, dtype), **{n: getattr(self, n).to(dtype) for n in SIDES})


def recast(weight: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """``weight`` with another logical dtype; ``weight.to(dtype)`` would copy the codes."""
    if weight.dtype == dtype:
        return weight
    return QuantizedTensor(weight._qdata, weight._layout_cls, replace(weight._params, orig_dtype=dtype))


def has_kernel(layout: str) -> bool:
    """Whether this machine multiplies in a layout as it is stored. (ComfyUI's loader has a list of its own.)"""
    return layout not in QUANTIZED_INPUT or get_layout_class(layout).supports_fast_matmul()


def beside(base: QuantizedTensor, **extras) -> CoreLowRankWeight:
    """A weight in one of ComfyUI's formats as one with a branch of rank 0. ``extras``: what its layer holds besides."""
    n, k = base.shape
    empty = [torch.empty(size, 0, dtype=base.dtype, device=base._qdata.device) for size in (k, n)]
    return CoreLowRankWeight(base, *empty, **extras)


def dequantize(w: CoreLowRankWeight) -> Tensor:
    """The effective (N, K) float32 weight in the raw-x domain, branch included."""
    dense = recast(w.base, torch.float32).dequantize()
    if w.pre_quant_scale is not None:
        dense = dense * w.pre_quant_scale.float()
    return dense + w.proj_up.float() @ w.proj_down.float().t()


def rows(w: CoreLowRankWeight, start: int, stop: int) -> CoreLowRankWeight:
    """Rows [start, stop): codes and scales of these outputs; what belongs to all of them is shared."""
    p, n = w.base._params, w.shape[0]
    cut = {}
    for name in p._tensor_fields():
        value = getattr(p, name)
        blocked = BLOCKED.get(w.base._layout_cls)
        if blocked is not None and name == blocked[0]:
            groups = -(-w.shape[1] // blocked[1])
            plain = from_blocked(value.view(torch.uint8), n, groups)[start:stop].contiguous()
            cut[name] = to_blocked(plain, flatten=False).view(value.dtype)
        elif value.dim() and value.shape[0] == n:
            cut[name] = value[start:stop].contiguous()
    params = replace(p, orig_shape=(stop - start, w.shape[1]), **cut)
    base = QuantizedTensor(w.base._qdata[start:stop].contiguous(), w.base._layout_cls, params)
    return replace(w, base=base, proj_up=w.proj_up[start:stop].contiguous())


def base_linear(x: Tensor, w: CoreLowRankWeight, bias: Tensor | None) -> Tensor:
    """The layer without its branch, x (..., K) -> (..., N), as ComfyUI computes it."""
    if w.pre_quant_scale is not None:
        x = x * w.pre_quant_scale.to(x.dtype)
    base = recast(w.base, x.dtype)
    if w.emulate or w.full_precision:
        return torch.nn.functional.linear(x, base.dequantize(), bias)
    if base._layout_cls not in QUANTIZED_INPUT:
        return torch.nn.functional.linear(x, base, bias)
    flat, scale = x.reshape(-1, x.shape[-1]), w.input_scale
    if scale is None and base._layout_cls == FORMATS["nvfp4"].layout:
        scale = nvfp4_scale(flat)
    q = QuantizedTensor.from_float(flat, base._layout_cls, scale=scale)
    return torch.nn.functional.linear(q, base, bias).reshape(*x.shape[:-1], w.shape[0])


def linear(x: Tensor, w: CoreLowRankWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) -> (..., N) in x's dtype."""
    y = base_linear(x, w, bias)
    return y + (x @ w.proj_down.to(x.dtype)) @ w.proj_up.to(x.dtype).t()
