"""Plain tensors <-> comfy-kitchen's QuantizedTensor: the one value that ComfyUI's and diffusers' modules both run.

Kitchen picks CUDA, HIP or its eager reference by itself. Of its own layouts awq_w4a16 is used as it is. Ours:

    NibbleSVDQuantLayout       kitchen's, with the kernel where `machine` says that there is one, else its reference.
                               (Kitchen's runs its CUDA kernel on every GPU, also below sm 80, where it has no body and
                               zeros come out, where rows are not aligned, and on AMD's)
    NibbleAWQLowRankLayout     kitchen's AWQ params + proj_down (K, R), proj_up (N, R), which a LoRA needs
                               y = awq(x) + (x proj_down) proj_up^T
    NibbleNVFP4LowRankLayout,  nvfp4 with a branch; GGUF and bitsandbytes codes; layers of several 4-bit parts: see
    NibbleWeightOnlyLayout,    `NibbleLayout`
    NibblePartsLayout
    Nibble<layout>LowRank      any layout of ComfyUI's formats with a branch: see `sub_layout`
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from functools import lru_cache

import comfy_kitchen
import torch
from comfy_kitchen.backends import eager
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.awq_w4a16 import TensorCoreAWQW4A16Layout
from comfy_kitchen.tensor.base import BaseLayoutParams, QuantizedLayout, get_layout_class
from comfy_kitchen.tensor.base import register_layout_class as register
from comfy_kitchen.tensor.base import register_layout_op as register_op
from comfy_kitchen.tensor.svdquant_w4a4 import TensorCoreSVDQuantW4A4Layout
from torch import Tensor, nn

from . import core_low_rank, machine, nvfp4_lowrank, packing, parts, svdquant, weight_only
from .awq import AWQWeight
from .core_low_rank import CoreLowRankWeight
from .nvfp4_lowrank import NVFP4LowRankWeight
from .parts import COLUMNS, ROWS, Parts, Plain
from .svdquant import SVDQuantWeight
from .weight_only import WeightOnly

LOW_RANK = "nibble_low_rank"
AWQ_LAYOUT = "TensorCoreAWQW4A16Layout"
SVDQUANT_LAYOUT, AWQ_LOW_RANK_LAYOUT = "NibbleSVDQuantLayout", "NibbleAWQLowRankLayout"
# Layouts of two buffers (`NibbleLayout`) -> the on-disk format
BUFFERED = {
    "NibblePartsLayout": "nibble_parts",
    "NibbleNVFP4LowRankLayout": "svdquant_nvfp4",
    "NibbleWeightOnlyLayout": "weight_only",
}
OURS = {SVDQUANT_LAYOUT: "svdquant_w4a4", AWQ_LAYOUT: "awq_w4a16", AWQ_LOW_RANK_LAYOUT: "awq_w4a16", **BUFFERED}
BY_CLASS = {NVFP4LowRankWeight: "NibbleNVFP4LowRankLayout", WeightOnly: "NibbleWeightOnlyLayout"}
ALIGN = 16
CLASSES = {c.__name__: c for c in (SVDQuantWeight, AWQWeight, NVFP4LowRankWeight, WeightOnly)}


def wrap(
    weight: Plain | Parts | CoreLowRankWeight, dtype: torch.dtype | None = None, tiled: bool = False
) -> QuantizedTensor:
    """A QuantizedTensor of logical shape (N, K) and ``dtype`` (default: the side tensors') that shares ``weight``'s
    memory. ``tiled``: svdquant_w4a4 in kitchen's tile-packed order (N % 128 == 0).
    """
    if isinstance(weight, CoreLowRankWeight):
        return _wrap_core(weight, dtype)
    if isinstance(weight, SVDQuantWeight):
        return _wrap_svdquant(weight, dtype, tiled)
    if isinstance(weight, AWQWeight):
        return _wrap_awq(weight, dtype)
    return _wrap_buffers(weight, dtype)


def unwrap(weight: QuantizedTensor) -> Plain | Parts | CoreLowRankWeight:
    """The plain tensors of a wrapped weight, in natural order, shared where the order allows it. Raises TypeError for a
    layout that is not ours.
    """
    layout = getattr(weight, "_layout_cls", type(weight).__name__)
    if not is_ours(weight):
        raise TypeError(f"{layout} is not a 4-bit layout of this pack; those are {', '.join(OURS)}")
    if is_low_rank(layout):
        return _unwrap_core(weight)
    if layout in BUFFERED:
        return _unwrap_buffers(weight)
    q, p = weight._qdata, weight._params
    if layout != SVDQUANT_LAYOUT:
        return AWQWeight(q, p.scale, p.zeros, getattr(p, "proj_down", None), getattr(p, "proj_up", None))
    scale, up = p.scale, p.proj_up
    if is_tiled(weight):
        q, scale, up = packing.untile_weight(q), packing.untile_scales(scale), packing.untile_up(up)
    return SVDQuantWeight(q, scale, p.smooth_factor, p.proj_down, up, p.act_unsigned)


def is_ours(weight) -> bool:
    """Whether ``weight`` is a QuantizedTensor in one of this pack's layouts."""
    return isinstance(weight, QuantizedTensor) and format_of(weight._layout_cls) is not None


def is_quantized(weight) -> bool:
    """Whether ``weight`` is a QuantizedTensor in any layout, ComfyUI's own included."""
    return isinstance(weight, QuantizedTensor)


def is_tiled(weight: QuantizedTensor) -> bool:
    """Whether svdquant_w4a4 codes lie in kitchen's tile-packed order."""
    return weight._qdata.dim() == 4


def is_low_rank(layout: str) -> bool:
    """Whether ``layout`` is one of ComfyUI's formats with a branch."""
    return layout.startswith("Nibble") and layout.endswith("LowRank")


def format_of(layout: str | None) -> str | None:
    """The on-disk format of one of this pack's layouts, None for any other."""
    return LOW_RANK if layout is not None and is_low_rank(layout) else OURS.get(layout)


def cast(weight: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """``weight`` with logical dtype and all side tensors in ``dtype`` (kernels want one dtype); codes are shared."""
    p = weight._params
    names = core_low_rank.SIDES if is_low_rank(weight._layout_cls) else p._tensor_fields()
    sides = {n: getattr(p, n).to(dtype) for n in names}
    return QuantizedTensor(weight._qdata, weight._layout_cls, replace(p, orig_dtype=dtype, **sides))


def side_dtype(weight: QuantizedTensor) -> torch.dtype:
    """The dtype of a weight's branch and of what else follows the compute dtype."""
    if not is_ours(weight):
        return weight.dtype  # ComfyUI's own formats: their scales have dtypes of their own
    return weight._params.proj_up.dtype if is_low_rank(weight._layout_cls) else weight._params.scale.dtype


def dense(weight: QuantizedTensor) -> Tensor:
    """The effective (N, K) float32 weight of a quantized one, in any layout."""
    if not is_ours(weight):
        return core_low_rank.recast(weight, torch.float32).dequantize()
    return parts.dequantize(unwrap(weight))


def shift(weight: QuantizedTensor) -> Tensor | None:
    """(N,) that a dense forward must add to the stored bias of an unsigned layer; None for every other weight."""
    signed = not is_ours(weight) or getattr(weight._params, "act_unsigned", None) is False
    return None if signed or is_low_rank(weight._layout_cls) else parts.shift(unwrap(weight))


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
        return wrap(replace(plain, proj_down=down, proj_up=up), p.orig_dtype)
    down = down.to(device=p.proj_down.device, dtype=p.proj_down.dtype)
    up = up.to(device=p.proj_up.device, dtype=p.proj_up.dtype)
    if is_tiled(weight):
        up = packing.tile_up(up)
    grown = replace(p, proj_down=torch.cat([p.proj_down, down], 1), proj_up=torch.cat([p.proj_up, up], 1))
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


def _with_product(layout: type, product) -> None:
    """Makes ``product`` (x, weight, bias or None) what F.linear, mm and addmm do with a weight in ``layout``; its t()
    is a flag.
    """
    aten = torch.ops.aten
    register(layout.__name__, layout)
    register_op(aten.t.default, layout)(_t)
    register_op(aten.linear.default, layout)(
        lambda qt, args, kwargs: product(args[0], args[1], args[2] if len(args) > 2 else None)
    )
    register_op(aten.mm.default, layout)(lambda qt, args, kwargs: product(args[0], args[1], None))
    register_op(aten.addmm.default, layout)(lambda qt, args, kwargs: product(args[1], args[2], args[0]))


def _t(qt, args, kwargs):
    p = args[0]._params
    flipped = replace(p, orig_shape=tuple(p.orig_shape[::-1]), transposed=not p.transposed)
    return QuantizedTensor(args[0]._qdata, args[0]._layout_cls, flipped)


def _upright(params):
    """``params`` of a weight (N, K), whichever way its view lies."""
    if not getattr(params, "transposed", False):
        return params
    return replace(params, transposed=False, orig_shape=tuple(params.orig_shape[::-1]))


class NibbleSVDQuantLayout(TensorCoreSVDQuantW4A4Layout):
    """svdquant_w4a4 with a choice of who multiplies; see the file header."""

    @classmethod
    def dequantize(cls, qdata: Tensor, params) -> Tensor:
        """(N, K), branch included; whoever asked transposes it. Kitchen sends an identity through 4-bit activations."""
        plain = QuantizedTensor(qdata, SVDQUANT_LAYOUT, _upright(params))
        return svdquant.dequantize(unwrap(plain)).to(params.orig_dtype)


def _wrap_svdquant(weight: SVDQuantWeight, dtype: torch.dtype | None, tiled: bool) -> QuantizedTensor:
    qweight, scale, up = weight.qweight, weight.wscales, weight.proj_up
    if tiled:
        qweight, scale, up = packing.tile_weight(qweight), packing.tile_scales(scale), packing.tile_up(up)
    params = NibbleSVDQuantLayout.Params(
        scale=scale,
        orig_dtype=dtype or weight.wscales.dtype,
        orig_shape=weight.shape,
        proj_down=weight.proj_down,
        proj_up=up,
        smooth_factor=weight.smooth_factor,
        act_unsigned=weight.act_unsigned,
    )
    return QuantizedTensor(qweight, SVDQUANT_LAYOUT, params)


def _svdquant(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    p, n = weight._params, _upright(weight._params).orig_shape[0]
    rows = x.reshape(-1, x.shape[-1])
    by = _multiplier(rows, n)
    main, raw = (rows + svdquant.SHIFT, rows) if p.act_unsigned else (rows, None)
    codes, scales, down = by.quantize_svdquant_w4a4(
        main.contiguous(), smooth=p.smooth_factor, lora_down=p.proj_down, act_unsigned=p.act_unsigned, lora_x=raw
    )
    y = by.scaled_mm_svdquant_w4a4(
        act=codes,
        wgt=weight._qdata,
        ascales=scales,
        wscales=p.scale,
        lora_act_in=down,
        lora_up=p.proj_up,
        bias=bias,
        act_unsigned=p.act_unsigned,
    )
    return y[: rows.shape[0]].reshape(*x.shape[:-1], n)


def _multiplier(x: Tensor, n: int):
    """What multiplies x (M, K) by an int4 (N, K) weight: kitchen's kernel, whatever its registry picks, or its
    reference.
    """
    if not x.is_cuda or machine.is_amd():
        return comfy_kitchen
    if x.dtype == torch.float32 or n % machine.ALIGNED_ROWS:
        return eager
    return machine.int4_kernels(x.device) or eager


class NibbleAWQLowRankLayout(TensorCoreAWQW4A16Layout):
    """awq_w4a16 with a low-rank branch; see the file header."""

    @dataclass(frozen=True)
    class Params(TensorCoreAWQW4A16Layout.Params):
        proj_down: Tensor = None
        proj_up: Tensor = None

        def _tensor_fields(self) -> list[str]:
            return ["scale", "zeros", "proj_down", "proj_up"]

    @classmethod
    def dequantize(cls, qdata: Tensor, params) -> Tensor:
        return super().dequantize(qdata, params) + (params.proj_up @ params.proj_down.t()).to(params.orig_dtype)

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params) -> dict[str, Tensor]:
        return super().state_dict_tensors(qdata, params) | {"_proj_down": params.proj_down, "_proj_up": params.proj_up}


def _wrap_awq(weight: AWQWeight, dtype: torch.dtype | None) -> QuantizedTensor:
    common = (weight.wscales, dtype or weight.wscales.dtype, weight.shape, weight.wzeros)
    if weight.proj_down is None:
        return QuantizedTensor(weight.qweight, AWQ_LAYOUT, TensorCoreAWQW4A16Layout.Params(*common))
    params = NibbleAWQLowRankLayout.Params(*common, proj_down=weight.proj_down, proj_up=weight.proj_up)
    return QuantizedTensor(weight.qweight, AWQ_LOW_RANK_LAYOUT, params)


def _awq_low_rank(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    p = _upright(weight._params)
    plain = TensorCoreAWQW4A16Layout.Params(p.scale, p.orig_dtype, p.orig_shape, p.zeros, p.group_size)
    y = nn.functional.linear(x, QuantizedTensor(weight._qdata, AWQ_LAYOUT, plain), bias)
    return y + (x.to(p.proj_down.dtype) @ p.proj_down) @ p.proj_up.t()


_with_product(NibbleSVDQuantLayout, _svdquant)
_with_product(NibbleAWQLowRankLayout, _awq_low_rank)


class NibbleLayout(QuantizedLayout):
    """What kitchen has no layout for. One buffer holds what keeps its dtype (codes, e4m3 and float32 scales), one what
    follows the compute dtype, and a branch that LoRAs lengthen: so ComfyUI can move, pin, cast and copy such a weight
    like any other. Views of the two buffers are the plain tensors again; nothing is copied to run.

        qdata             uint8, every fixed tensor one after the other, each at a multiple of 16 bytes
        scale             compute dtype, every side tensor one after the other, likewise
        proj_down (K, r)  proj_up (N, r)      r may be 0
        spec              (axis, part, part ...), part = (class name, (field, buffer, dtype, shape) ...)

    Subclasses differ in name only, which says what a layer is.
    """

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        proj_down: Tensor = None
        proj_up: Tensor = None
        spec: tuple = ()
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return ["scale", "proj_down", "proj_up"]

    @classmethod
    def quantize(cls, tensor, **kwargs):
        raise NotImplementedError(f"{cls.__name__} holds what a file brought; it quantizes nothing")

    @classmethod
    def dequantize(cls, qdata: Tensor, params) -> Tensor:
        return parts.dequantize(_views(qdata, params)).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params) -> dict[str, Tensor]:
        return {"": qdata, "_scale": params.scale, "_proj_down": params.proj_down, "_proj_up": params.proj_up}


def _wrap_buffers(weight: Plain | Parts, dtype: torch.dtype | None) -> QuantizedTensor:
    whole = weight if isinstance(weight, Parts) else Parts((weight,), ROWS)
    fixed, sides, spec = [], [], [whole.axis]
    for part in whole.parts:
        entries = []
        for f in dataclasses.fields(part):
            value = getattr(part, f.name)
            if not isinstance(value, Tensor):
                entries.append((f.name, "value", value, ()))
                continue
            keeps = f.name not in getattr(part, "SIDES", ())
            (fixed if keeps else sides).append(value)
            entries.append((f.name, "fixed" if keeps else "side", value.dtype if keeps else None, tuple(value.shape)))
        spec.append((type(part).__name__, *entries))
    side_dtype = dtype or (sides[0].dtype if sides else torch.bfloat16)
    (n, k), device = whole.shape, fixed[0].device
    branch = [whole.proj_down, whole.proj_up]
    if whole.proj_down is None:
        branch = [torch.empty(k, 0, device=device), torch.empty(n, 0, device=device)]
    scale = _flat([s.to(side_dtype) for s in sides], side_dtype, device)
    params = NibbleLayout.Params(scale, side_dtype, (n, k), *(b.to(side_dtype) for b in branch), spec=tuple(spec))
    single = type(whole.parts[0]) if len(whole.parts) == 1 else Parts
    data = _flat([t.contiguous().reshape(-1).view(torch.uint8) for t in fixed], torch.uint8, device)
    return QuantizedTensor(data, BY_CLASS.get(single, "NibblePartsLayout"), params)


def _flat(tensors: list[Tensor], dtype: torch.dtype, device) -> Tensor:
    """The tensors as one 1-D tensor, each padded to `ALIGN` elements; a single one that needs no padding is a view."""
    flat = [t.reshape(-1) for t in tensors]
    if len(flat) == 1 and flat[0].numel() % ALIGN == 0:
        return flat[0]
    padded = [nn.functional.pad(t, (0, -t.numel() % ALIGN)) for t in flat]
    return torch.cat(padded) if padded else torch.empty(0, dtype=dtype, device=device)


def _views(qdata: Tensor, params) -> Plain | Parts:
    """The plain weight whose tensors are views of the buffers."""
    at = {"fixed": 0, "side": 0}
    axis, *specs = params.spec
    found = []
    for name, *entries in specs:
        values = {}
        for field, buffer, kind, shape in entries:
            if buffer == "value":
                values[field] = kind
                continue
            count = torch.Size(shape).numel() * (kind.itemsize if buffer == "fixed" else 1)
            piece = (qdata if buffer == "fixed" else params.scale)[at[buffer] : at[buffer] + count]
            values[field] = (piece.view(kind) if buffer == "fixed" else piece).view(shape)
            at[buffer] += count + -count % ALIGN
        found.append(CLASSES[name](**values))
    if params.proj_down.shape[1]:
        return Parts(tuple(found), axis, params.proj_down, params.proj_up)
    return Parts(tuple(found), axis) if len(found) > 1 else found[0]


def _unwrap_buffers(weight: QuantizedTensor) -> Plain | Parts:
    """A LoRA's branch lengthens the one that a weight has of its own (a copy); beside any other weight it makes it
    `Parts`.
    """
    w = _views(weight._qdata, weight._params)
    if isinstance(w, Parts) and len(w.parts) == 1 and isinstance(w.parts[0], NVFP4LowRankWeight):
        part, names = w.parts[0], ("proj_down", "proj_up")  # both branches see the raw x
        return replace(part, **{n: torch.cat([getattr(part, n), getattr(w, n)], 1) for n in names})
    return w


def _part_linear(x: Tensor, w: Plain) -> Tensor:
    """One part's product, without bias, in x's dtype."""
    if isinstance(w, NVFP4LowRankWeight):
        return nvfp4_lowrank.linear(x, w)
    if isinstance(w, WeightOnly):
        return weight_only.linear(x, w)
    return nn.functional.linear(x.contiguous(), wrap(w))


def _parts_linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    w = _unwrap_buffers(weight)
    whole = w if isinstance(w, Parts) else Parts((w,), ROWS)
    if whole.axis == COLUMNS:
        shares = x.split([p.shape[1] for p in whole.parts], -1)
        y = sum(_part_linear(share, p) for share, p in zip(shares, whole.parts, strict=True))
    else:
        outputs = [_part_linear(x, p) for p in whole.parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    if whole.proj_down is not None:
        y = y + (x @ whole.proj_down.to(x.dtype)) @ whole.proj_up.to(x.dtype).t()
    return y if bias is None else y + bias.to(y.dtype)


_with_product(NibbleLayout, _parts_linear)
for _name in BUFFERED:
    register(_name, type(_name, (NibbleLayout,), {}))


@dataclass(frozen=True)
class _BranchParams:
    """What a sub-layout adds to the parameters of its layout."""

    proj_down: Tensor | None = None
    proj_up: Tensor | None = None
    input_scale: Tensor | None = None
    pre_quant_scale: Tensor | None = None
    emulate: bool = False
    full_precision: bool = False
    transposed: bool = False

    def _tensor_fields(self) -> list[str]:
        return [*super()._tensor_fields(), *(n for n in core_low_rank.TENSORS if getattr(self, n) is not None)]


class _Branch:
    """What a sub-layout adds to its layout."""

    @classmethod
    def dequantize(cls, qdata: Tensor, params) -> Tensor:
        plain = QuantizedTensor(qdata, cls.__name__, _upright(params))
        return core_low_rank.dequantize(_unwrap_core(plain)).to(params.orig_dtype)

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params) -> dict[str, Tensor]:
        extras = {f"_{n}": getattr(params, n) for n in core_low_rank.TENSORS if getattr(params, n) is not None}
        return super().state_dict_tensors(qdata, params) | extras


@lru_cache(maxsize=64)
def sub_layout(name: str) -> str:
    """The registered name of the layout ``name`` with a branch, made when it is first needed: its parameters are the
    layout's own and `_BranchParams`, the codes its own tensor, never rounded again.
    """
    base = get_layout_class(name)
    params = dataclass(frozen=True)(type("Params", (_BranchParams, base.Params), {}))
    made = type(f"Nibble{name}LowRank", (_Branch, base), {"Params": params, "base_layout": name})
    _with_product(made, lambda x, weight, bias: core_low_rank.linear(x, _unwrap_core(weight), bias))
    return made.__name__


def _wrap_core(weight: CoreLowRankWeight, dtype: torch.dtype | None) -> QuantizedTensor:
    base = weight.base
    layout = sub_layout(base._layout_cls)
    values = {f.name: getattr(base._params, f.name) for f in dataclasses.fields(base._params)}
    values |= {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight) if f.name != "base"}
    values["orig_dtype"] = base.dtype if dtype is None else dtype
    return QuantizedTensor(base._qdata, layout, get_layout_class(layout).Params(**values))


def _unwrap_core(weight: QuantizedTensor) -> CoreLowRankWeight:
    p, name = _upright(weight._params), get_layout_class(weight._layout_cls).base_layout
    plain = get_layout_class(name).Params
    base = plain(**{f.name: getattr(p, f.name) for f in dataclasses.fields(plain)})
    extras = {f.name: getattr(p, f.name) for f in dataclasses.fields(CoreLowRankWeight) if f.name != "base"}
    return CoreLowRankWeight(QuantizedTensor(weight._qdata, name, base), **extras)
