"""ComfyUI's own formats with a low-rank branch beside them: what a LoRA, or another pack's file, adds to such a layer.

    y = q(x pre_quant_scale) Wq^T + (x proj_down) proj_up^T + bias

Every layout of comfy-kitchen gets a sub-layout with the branch, made when it is first needed, named after it:

    Nibble<layout>LowRank    Params = the layout's own + proj_down (K, R), proj_up (N, R)
                             + input_scale (), pre_quant_scale (K,), both optional (nvfp4, fp8)
                             + emulate: dequantize, because this machine has no kernel
                             + full_precision: dequantize, because the file asks for it

The codes are the layout's own tensor, never rounded again. The branch sees the raw x. Source: ComfyUI's comfy/ops.py
(mixed_precision_ops.Linear.forward), of which `base_linear` is the arithmetic.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from comfy_kitchen.float_utils import from_blocked, to_blocked
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.base import get_layout_class, register_layout_class
from torch import Tensor

from .core_formats import FORMATS, nvfp4_scale
from .kitchen import register_linear

START, END = "Nibble", "LowRank"
OWN = ("proj_down", "proj_up", "input_scale", "pre_quant_scale")  # tensors that the sub-layouts add
SIDES = ("proj_down", "proj_up")  # those of them in the compute dtype
FLAGS = ("emulate", "full_precision")
# Layouts whose scales lie in cuBLAS's blocks: (parameter, columns that share a scale)
BLOCKED = {"TensorCoreNVFP4Layout": ("block_scale", 16), "TensorCoreMXFP8Layout": ("scale", 32)}
# Layouts whose product wants its input quantized first; the others quantize it themselves.
QUANTIZED_INPUT = ("TensorCoreFP8Layout", "TensorCoreFP8E4M3Layout", "TensorCoreFP8E5M2Layout", "TensorCoreMXFP8Layout",
                   "TensorCoreNVFP4Layout")  # fmt: skip


@dataclass(frozen=True)
class CoreLowRankWeight:
    """``base``: an (N, K) QuantizedTensor in one of ComfyUI's formats. Raises ValueError when shapes do not belong
    together.
    """

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


def is_layout(name: str) -> bool:
    return name.startswith(START) and name.endswith(END)


@lru_cache(maxsize=64)
def sub_layout(name: str) -> str:
    """The registered name of the layout ``name`` with a branch."""
    base = get_layout_class(name)

    @dataclass(frozen=True)
    class Params(base.Params):
        proj_down: Tensor | None = None
        proj_up: Tensor | None = None
        input_scale: Tensor | None = None
        pre_quant_scale: Tensor | None = None
        emulate: bool = False
        full_precision: bool = False
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return [*super()._tensor_fields(), *(n for n in OWN if getattr(self, n) is not None)]

    made = type(f"{START}{name}{END}", (base,), {
        "Params": Params, "base_layout": name, "dequantize": classmethod(_dequantize),
        "state_dict_tensors": classmethod(_state_dict_tensors),
    })  # fmt: skip
    register_layout_class(made.__name__, made)
    register_linear(made, lambda x, weight, bias: linear(x, unwrap(weight), bias))
    return made.__name__


def _dequantize(cls, qdata: Tensor, params) -> Tensor:
    whole = dequantize(unwrap(QuantizedTensor(qdata, cls.__name__, replace(params, **_physical(params)))))
    return whole.to(params.orig_dtype)


def _state_dict_tensors(cls, qdata: Tensor, params) -> dict[str, Tensor]:
    out = get_layout_class(cls.base_layout).state_dict_tensors(qdata, params)
    return out | {f"_{n}": getattr(params, n) for n in OWN if getattr(params, n) is not None}


def _physical(params) -> dict:
    """The (N, K) of a transposed view, as replacements."""
    if not getattr(params, "transposed", False):
        return {}
    return {"transposed": False, "orig_shape": tuple(params.orig_shape[::-1])}


def wrap(weight: CoreLowRankWeight, dtype: torch.dtype | None = None) -> QuantizedTensor:
    """A QuantizedTensor of logical ``dtype`` (default: the base's) that shares ``weight``'s memory."""
    base = weight.base
    layout = sub_layout(base._layout_cls)
    own = {f.name: getattr(base._params, f.name) for f in dataclasses.fields(base._params)}
    own |= {n: getattr(weight, n) for n in (*OWN, *FLAGS)}
    own["orig_dtype"] = base.dtype if dtype is None else dtype
    return QuantizedTensor(base._qdata, layout, get_layout_class(layout).Params(**own))


def unwrap(weight: QuantizedTensor) -> CoreLowRankWeight:
    """The plain value of a wrapped weight; nothing is copied."""
    p = weight._params
    cls = get_layout_class(weight._layout_cls)
    plain = get_layout_class(cls.base_layout).Params
    values = {f.name: getattr(p, f.name) for f in dataclasses.fields(plain)} | _physical(p)
    base = QuantizedTensor(weight._qdata, cls.base_layout, plain(**values))
    return CoreLowRankWeight(base, **{n: getattr(p, n) for n in (*OWN, *FLAGS)})


def has_kernel(layout: str) -> bool:
    """Whether this machine multiplies in a layout as it is stored. (ComfyUI's loader has a list of its own.)"""
    return layout not in QUANTIZED_INPUT or get_layout_class(layout).supports_fast_matmul()


def beside(base: QuantizedTensor, **more) -> CoreLowRankWeight:
    """A weight in one of ComfyUI's formats as one with a branch of rank 0. ``more``: what its layer holds besides."""
    n, k = base.shape
    empty = [torch.empty(size, 0, dtype=base.dtype, device=base._qdata.device) for size in (k, n)]
    return CoreLowRankWeight(base, *empty, **more)


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
