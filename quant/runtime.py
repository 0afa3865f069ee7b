"""comfy-kitchen layouts for what kitchen has no layout for: nvfp4 with a branch, stored codes, layers of several parts.

One buffer for what keeps its dtype (codes, e4m3 and float32 scales), one for what follows the compute dtype, and a
branch that LoRAs lengthen: so ComfyUI can move, pin, cast and copy such a weight like any other. Views of the two
buffers are the plain tensors again; nothing is copied to run.

    qdata             uint8, every fixed tensor one after the other, each at a multiple of 16 bytes
    scale             compute dtype, every side tensor one after the other, likewise
    proj_down (K, r)  proj_up (N, r)      r may be 0
    spec              what the buffers hold: (axis, part, part ...), part = (class name, (field, place, dtype, shape)
    ...)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.base import BaseLayoutParams, QuantizedLayout, register_layout_class
from torch import Tensor

from . import kitchen, nvfp4_lowrank, parts, weight_only
from .awq import AWQWeight
from .nvfp4_lowrank import NVFP4LowRankWeight
from .parts import COLUMNS, ROWS, Parts, Plain
from .svdquant import SVDQuantWeight
from .weight_only import WeightOnly

ALIGN = 16
CLASSES = {c.__name__: c for c in (SVDQuantWeight, AWQWeight, NVFP4LowRankWeight, WeightOnly)}
FIXED = {"SVDQuantWeight": {"qweight"}, "AWQWeight": {"qweight"},
         "NVFP4LowRankWeight": {"qweight", "block_scale", "channel_scale"},
         "WeightOnly": {"qdata", "absmax", "table"}}  # fmt: skip


class NibbleLayout(QuantizedLayout):
    """See the file header. Subclasses differ in name only, which says what a layer is."""

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
        return parts.dequantize(_plain(qdata, params)).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params) -> dict[str, Tensor]:
        return {"": qdata, "_scale": params.scale, "_proj_down": params.proj_down, "_proj_up": params.proj_up}


class NibblePartsLayout(NibbleLayout):
    """Layers of several 4-bit parts."""


class NibbleNVFP4LowRankLayout(NibbleLayout):
    """nvfp4 with a low-rank branch."""


class NibbleWeightOnlyLayout(NibbleLayout):
    """GGUF and bitsandbytes codes as they are."""


OURS = {
    "NibblePartsLayout": "nibble_parts",
    "NibbleNVFP4LowRankLayout": "svdquant_nvfp4",
    "NibbleWeightOnlyLayout": "weight_only",
}
BY_CLASS = {NVFP4LowRankWeight: "NibbleNVFP4LowRankLayout", WeightOnly: "NibbleWeightOnlyLayout"}
for _cls in (NibblePartsLayout, NibbleNVFP4LowRankLayout, NibbleWeightOnlyLayout):
    register_layout_class(_cls.__name__, _cls)


def wrap(weight: Plain | Parts, dtype: torch.dtype | None = None) -> QuantizedTensor:
    """A QuantizedTensor of logical shape (N, K). ``dtype``: logical, and of the side tensors (default: as they are)."""
    whole = weight if isinstance(weight, Parts) else Parts((weight,), ROWS)
    fixed, sides, spec = [], [], [whole.axis]
    for part in whole.parts:
        name, entries = type(part).__name__, []
        for f in dataclasses.fields(part):
            value = getattr(part, f.name)
            if not isinstance(value, Tensor):
                entries.append((f.name, "value", value, ()))
                continue
            keeps = f.name in FIXED[name]
            (fixed if keeps else sides).append(value)
            entries.append((f.name, "fixed" if keeps else "side", value.dtype if keeps else None, tuple(value.shape)))
        spec.append((name, *entries))
    side_dtype = dtype or (sides[0].dtype if sides else torch.bfloat16)
    (n, k), device = whole.shape, fixed[0].device
    branch = [whole.proj_down, whole.proj_up]
    if whole.proj_down is None:
        branch = [torch.empty(k, 0, device=device), torch.empty(n, 0, device=device)]
    params = NibbleLayout.Params(
        _flat([s.to(side_dtype) for s in sides], side_dtype, device), side_dtype, (n, k),
        *(b.to(side_dtype) for b in branch), spec=tuple(spec),
    )  # fmt: skip
    single = len(whole.parts) == 1
    layout = BY_CLASS.get(type(whole.parts[0]), "NibblePartsLayout") if single else "NibblePartsLayout"
    data = _flat([_bytes(f) for f in fixed], torch.uint8, device)
    return QuantizedTensor(data, layout, params)


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def _flat(tensors: list[Tensor], dtype: torch.dtype, device) -> Tensor:
    """The tensors as one 1-D tensor, each padded to `ALIGN` elements; a single one that needs no padding is a view."""
    flat = [t.reshape(-1) for t in tensors]
    if len(flat) == 1 and flat[0].numel() % ALIGN == 0:
        return flat[0]
    padded = [torch.nn.functional.pad(t, (0, -t.numel() % ALIGN)) for t in flat]
    return torch.cat(padded) if padded else torch.empty(0, dtype=dtype, device=device)


def _plain(qdata: Tensor, params) -> Plain | Parts:
    """The plain weight whose tensors are views of the buffers."""
    at = {"fixed": 0, "side": 0}
    axis, *specs = params.spec
    found = []
    for name, *entries in specs:
        values = {}
        for field, place, kind, shape in entries:
            if place == "value":
                values[field] = kind
                continue
            count = torch.Size(shape).numel() * (kind.itemsize if place == "fixed" else 1)
            buffer = qdata if place == "fixed" else params.scale
            piece = buffer[at[place] : at[place] + count]
            values[field] = (piece.view(kind) if place == "fixed" else piece).view(shape)
            at[place] += count + -count % ALIGN
        found.append(CLASSES[name](**values))
    if params.proj_down.shape[1]:
        return Parts(tuple(found), axis, params.proj_down, params.proj_up)
    return Parts(tuple(found), axis) if len(found) > 1 else found[0]


def unwrap(weight: QuantizedTensor) -> Plain | Parts:
    """The plain tensors of a wrapped weight, as views. A LoRA's branch lengthens the one that a weight has of its own
    (a copy); beside any other weight it makes it `Parts`.
    """
    w = _plain(weight._qdata, weight._params)
    if isinstance(w, Parts) and len(w.parts) == 1 and isinstance(w.parts[0], NVFP4LowRankWeight):
        own, names = w.parts[0], ("proj_down", "proj_up")  # both branches see the raw x
        return dataclasses.replace(own, **{n: torch.cat([getattr(own, n), getattr(w, n)], 1) for n in names})
    return w


def part_linear(x: Tensor, w: Plain) -> Tensor:
    """One part's product, without bias, in x's dtype."""
    if isinstance(w, NVFP4LowRankWeight):
        return nvfp4_lowrank.linear(x, w)
    if isinstance(w, WeightOnly):
        return weight_only.linear(x, w)
    return torch.nn.functional.linear(x.contiguous(), kitchen.wrap(w))


def _forward(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    w = unwrap(weight)
    whole = w if isinstance(w, Parts) else Parts((w,), ROWS)
    if whole.axis == COLUMNS:
        shares = x.split([p.shape[1] for p in whole.parts], -1)
        y = sum(part_linear(share, p) for share, p in zip(shares, whole.parts, strict=True))
    else:
        outputs = [part_linear(x, p) for p in whole.parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    if whole.proj_down is not None:
        y = y + (x @ whole.proj_down.to(x.dtype)) @ whole.proj_up.to(x.dtype).t()
    return y if bias is None else y + bias.to(y.dtype)


kitchen.register_linear(NibbleLayout, _forward)
