"""Plain tensors <-> comfy-kitchen's QuantizedTensor: the one value that ComfyUI's and diffusers' modules both run.

Kitchen picks CUDA, HIP or its eager reference by itself. `kitchen` holds the layouts it has kernels for, `runtime`
those it has none for, `core_low_rank` ComfyUI's own formats with a branch; everything else asks here.
"""

from __future__ import annotations

import dataclasses

import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.base import get_layout_class
from torch import Tensor, nn

from . import core_low_rank, kitchen, packing, parts, runtime
from .awq import AWQWeight
from .core_low_rank import CoreLowRankWeight
from .kitchen import AWQ_LAYOUT, AWQ_LOW_RANK_LAYOUT, SVDQUANT_LAYOUT, is_tiled
from .parts import Parts, Plain
from .svdquant import SVDQuantWeight

LOW_RANK = "nibble_low_rank"
OURS = {SVDQUANT_LAYOUT: "svdquant_w4a4", AWQ_LAYOUT: "awq_w4a16", AWQ_LOW_RANK_LAYOUT: "awq_w4a16", **runtime.OURS}


def wrap(
    weight: Plain | Parts | CoreLowRankWeight, dtype: torch.dtype | None = None, tiled: bool = False
) -> QuantizedTensor:
    """A QuantizedTensor of logical shape (N, K) and ``dtype`` (default: the side tensors') that shares ``weight``'s
    memory.

    ``tiled``: svdquant_w4a4 in kitchen's tile-packed order (N % 128 == 0).
    """
    if isinstance(weight, CoreLowRankWeight):
        return core_low_rank.wrap(weight, dtype)
    if not isinstance(weight, SVDQuantWeight | AWQWeight):
        return runtime.wrap(weight, dtype)
    return kitchen.wrap(weight, dtype, tiled)


def is_ours(weight) -> bool:
    """Whether ``weight`` is a QuantizedTensor in one of this pack's layouts."""
    return isinstance(weight, QuantizedTensor) and format_of(weight._layout_cls) is not None


def is_quantized(weight) -> bool:
    """Whether ``weight`` is a QuantizedTensor in any layout, ComfyUI's own included."""
    return isinstance(weight, QuantizedTensor)


def format_of(layout: str | None) -> str | None:
    """The on-disk format of one of this pack's layouts, None for any other."""
    if layout is not None and core_low_rank.is_layout(layout):
        return LOW_RANK
    return OURS.get(layout)


def unwrap(weight: QuantizedTensor) -> Plain | Parts | CoreLowRankWeight:
    """The plain tensors of a wrapped weight, in natural order. Raises TypeError for a layout that is not ours."""
    if not is_ours(weight):
        name = getattr(weight, "_layout_cls", type(weight).__name__)
        raise TypeError(f"{name} is not a 4-bit layout of this pack; those are {', '.join(OURS)}")
    if weight._layout_cls in runtime.OURS:
        return runtime.unwrap(weight)
    if core_low_rank.is_layout(weight._layout_cls):
        return core_low_rank.unwrap(weight)
    return kitchen.unwrap(weight)


def cast(weight: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """``weight`` with logical dtype and all side tensors in ``dtype`` (kernels want one dtype); codes are shared."""
    p = weight._params
    names = core_low_rank.SIDES if core_low_rank.is_layout(weight._layout_cls) else p._tensor_fields()
    sides = {n: getattr(p, n).to(dtype) for n in names}
    return QuantizedTensor(weight._qdata, weight._layout_cls, dataclasses.replace(p, orig_dtype=dtype, **sides))


def side_dtype(weight: QuantizedTensor) -> torch.dtype:
    """The dtype of a weight's branch and of what else follows the compute dtype."""
    if not is_ours(weight):
        return weight.dtype  # ComfyUI's own formats: their scales have dtypes of their own
    return weight._params.proj_up.dtype if core_low_rank.is_layout(weight._layout_cls) else weight._params.scale.dtype


def dense(weight: QuantizedTensor) -> Tensor:
    """The effective (N, K) float32 weight of a quantized one, in any layout."""
    if not is_ours(weight):
        return core_low_rank.recast(weight, torch.float32).dequantize()
    return parts.dequantize(unwrap(weight))


def shift(weight: QuantizedTensor) -> Tensor | None:
    """(N,) that a dense forward must add to the stored bias of an unsigned layer; None for every other weight."""
    signed = not is_ours(weight) or getattr(weight._params, "act_unsigned", None) is False
    return None if signed or core_low_rank.is_layout(weight._layout_cls) else parts.shift(unwrap(weight))


def extend(weight: QuantizedTensor, down: Tensor, up: Tensor) -> QuantizedTensor:
    """``weight`` with its low-rank branch grown by ``up`` (N, r) @ ``down`` (K, r)^T; the 4-bit codes are shared,
    untouched.

    The order of several extensions does not change the result beyond rounding. Source: docs/lora.md.
    """
    p = weight._params
    if not is_ours(weight):
        return extend(wrap(core_low_rank.beside(weight)), down, up)
    if weight._layout_cls == AWQ_LAYOUT:
        plain = unwrap(weight)
        down, up = (t.to(device=p.scale.device, dtype=p.scale.dtype).contiguous() for t in (down, up))
        return wrap(dataclasses.replace(plain, proj_down=down, proj_up=up), p.orig_dtype)
    down = down.to(device=p.proj_down.device, dtype=p.proj_down.dtype)
    up = up.to(device=p.proj_up.device, dtype=p.proj_up.dtype)
    if is_tiled(weight):
        up = packing.tile_up(up)
    grown = dataclasses.replace(p, proj_down=torch.cat([p.proj_down, down], 1), proj_up=torch.cat([p.proj_up, up], 1))
    return QuantizedTensor(weight._qdata, weight._layout_cls, grown)


def nbytes(weight: Tensor, side: int | None = None) -> int:
    """Bytes that a weight really takes: codes and every side tensor (QuantizedTensor.nbytes counts codes only).

    ``side``: count each side element as so many bytes, whatever its dtype is now.
    """
    if not isinstance(weight, QuantizedTensor):
        return weight.numel() * weight.element_size()
    p = weight._params  # not by `tensors`: kitchen has no names for codes that it has packed for one GPU
    sides = [getattr(p, name) for name in p._tensor_fields()]
    count = sum(t.numel() * (side or t.element_size()) for t in sides if t is not None)
    return count + weight._qdata.numel() * weight._qdata.element_size()


def held(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of ``module``, quantized ones with all that belongs to them."""
    return sum(nbytes(t) for t in (*module.parameters(), *module.buffers()))


def tensors(weight: QuantizedTensor) -> dict[str, Tensor]:
    """Every tensor inside ``weight`` by kitchen's own suffixes, "" for the codes."""
    return get_layout_class(weight._layout_cls).state_dict_tensors(weight._qdata, weight._params)
