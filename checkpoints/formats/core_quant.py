"""Layers in ComfyUI's own quantized formats: written as ComfyUI reads them, and read where ComfyUI itself does not.

    float8_e4m3fn    weight F8_E4M3 (N, K)   weight_scale F32 ()
    float8_e5m2      weight F8_E5M2 (N, K)   weight_scale F32 ()
    mxfp8            weight F8_E4M3 (N, K)   weight_scale F8_E8M0, blocked
    nvfp4            weight U8 (N, K/2)      weight_scale F8_E4M3, blocked    weight_scale_2 F32 ()
    int8_tensorwise  weight I8 (N, K)        weight_scale F32 () or (N, 1)    JSON convrot, convrot_groupsize
    convrot_w4a4     weight I8 (N, K/2)      weight_scale F32 (N,)            JSON convrot_groupsize, linear_dtype
    asym_w4a8_int8   weight I8 (N, K/2), or (N, 3K/4) for 6-bit codes         JSON group_size, convrot_groupsize
                     weight_s_rel F8_E4M3 (N, K/group)   weight_s_channel F32 (N)   weight_codebook F32 (16,) optional
    all of them      input_scale, pre_quant_scale (K,) optional               JSON full_precision_matrix_mult

Every layer carries its JSON in a U8 tensor ``<layer>.comfy_quant``; options may stand in its object ``params``. Source:
comfy/ops.py of ComfyUI 0.33. Plain layers of these formats are ComfyUI's to load: `comfy_quant.read` leaves them alone.
It asks for `build` where a low-rank branch lies beside one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.base import get_layout_class
from torch import Tensor

from ...quant.core_low_rank import CoreLowRankWeight, beside, has_kernel
from ...quant.kernels import tensors
from ...quant.schemes import GROUP
from .stored import encode_config

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)
FULL_PRECISION = "full_precision_matrix_mult"
EXTRAS = ("input_scale", "pre_quant_scale")  # of the layer, not of its weight


@dataclass(frozen=True)
class CoreFormat:
    """``layout``: kitchen's, as ComfyUI names it. ``parts``: its parameter -> (the tensor's name, the dtype it is read
    as, None for its own). ``bits``: what a code may have. ``tile``: codes may be padded to multiples of it.
    ``options``: JSON -> the parameters that are no tensors.
    """

    layout: str
    storage: torch.dtype
    parts: Mapping[str, tuple[str, torch.dtype | None]]
    bits: tuple[int, ...] = (8,)
    tile: int = 1
    options: Callable[[Mapping], dict] = lambda config: {}
    optional: frozenset[str] = frozenset()

    def shapes(self, n: int, k: int) -> set[tuple[int, int]]:
        """Every shape in which the codes of an (N, K) weight may be stored."""
        rows, columns = ({size, -(-size // self.tile) * self.tile} for size in (n, k))
        return {(r, c * b // 8) for r in rows for c in columns for b in self.bits}


def _option(config: Mapping, name: str, default):
    """An option of the JSON, at its top or in ``params``. Raises ValueError for one of another kind."""
    params = config.get("params")
    value = config.get(name, params.get(name, default) if isinstance(params, dict) else default)
    if type(value) is not type(default):
        raise ValueError(f"its {name} is {str(value)[:40]!r}, expected one like {default!r}")
    return value


def _int8(config: Mapping) -> dict:
    if not _option(config, "convrot", False):
        return {}
    return {"convrot": True, "convrot_groupsize": _option(config, "convrot_groupsize", 256)}


def _convrot(config: Mapping) -> dict:
    options = {n: _option(config, n, default) for n, default in (("convrot_groupsize", 256), ("linear_dtype", "int4"))}
    return {**options, "quant_group_size": GROUP}


def _asym(config: Mapping) -> dict:
    return {n: _option(config, n, default) for n, default in (("group_size", 16), ("convrot_groupsize", 256))}


SCALE = {"scale": ("weight_scale", None)}
FORMATS: dict[str, CoreFormat] = {
    "float8_e4m3fn": CoreFormat("TensorCoreFP8E4M3Layout", E4M3, SCALE),
    "float8_e5m2": CoreFormat("TensorCoreFP8E5M2Layout", E5M2, SCALE),
    "mxfp8": CoreFormat("TensorCoreMXFP8Layout", E4M3, {"scale": ("weight_scale", E8M0)}, tile=32),
    "nvfp4": CoreFormat("TensorCoreNVFP4Layout", torch.uint8,
                        {"scale": ("weight_scale_2", None), "block_scale": ("weight_scale", E4M3)}, (4,), tile=16),
    "int8_tensorwise": CoreFormat("TensorWiseINT8Layout", torch.int8, SCALE, options=_int8),
    "convrot_w4a4": CoreFormat("TensorCoreConvRotW4A4Layout", torch.int8, SCALE, (4,), options=_convrot),
    "asym_w4a8_int8": CoreFormat(
        "AsymW4A8Int8Layout", torch.int8,
        {"scale": ("weight_s_rel", E4M3), "s_channel": ("weight_s_channel", None),
         "codebook": ("weight_codebook", None)}, (4, 6), options=_asym, optional=frozenset({"codebook"}),
    ),
}  # fmt: skip
BY_LAYOUT = {f.layout: id for id, f in FORMATS.items()}


def config_of(weight: QuantizedTensor) -> dict:
    """The JSON of a layer. Raises KeyError for a layout that is none of ComfyUI's."""
    id, p = BY_LAYOUT[weight._layout_cls], weight._params
    if id == "int8_tensorwise":
        named = ("convrot", "convrot_groupsize") if getattr(p, "convrot", False) else ()
    elif id == "convrot_w4a4":
        named = ("convrot_groupsize", *(("linear_dtype",) if p.linear_dtype != "int4" else ()))
    else:
        named = ("group_size", "convrot_groupsize") if id == "asym_w4a8_int8" else ()
    return {"format": id, **{n: getattr(p, n) for n in named}}


def parts_of(weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a weight under their on-disk names, its JSON excepted."""
    return {f"weight{suffix}": t.contiguous() for suffix, t in tensors(weight).items()}


def write(layer: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of one layer under ``layer``, without bias. Raises KeyError for any other layout."""
    parts = parts_of(weight) | {"comfy_quant": encode_config(config_of(weight))}
    return {f"{layer}.{name}": t for name, t in parts.items()}


@dataclass(frozen=True)
class StoredCore:
    """A layer in one of ComfyUI's formats as read: its JSON and its tensors by on-disk name."""

    config: Mapping
    parts: Mapping[str, Tensor]

    def build(self, shape: tuple[int, int], dtype: torch.dtype) -> CoreLowRankWeight:
        """The (N, K) weight with a branch of rank 0. Raises ValueError for tensors that do not fit."""
        extras = {n: self.parts.get(n) for n in EXTRAS}
        base = build(self.config, self.parts, shape, dtype)
        full, emulate = bool(self.config.get(FULL_PRECISION, False)), not has_kernel(base._layout_cls)
        return beside(base, **extras, full_precision=full, emulate=emulate)


def take(tensors: MutableMapping[str, Tensor], layer: str, config: Mapping) -> StoredCore:
    """Takes a layer's tensors out of ``tensors``; its bias stays."""
    names = ("weight", *(n for n, _ in FORMATS[config["format"]].parts.values()), *EXTRAS)
    return StoredCore(config, {n: tensors.pop(f"{layer}.{n}") for n in names if f"{layer}.{n}" in tensors})


def build(config: Mapping, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> QuantizedTensor:
    """The weight of a layer from ``parts`` (on-disk name -> tensor). Raises ValueError for what is missing or does not
    fit.
    """
    id = str(config.get("format"))
    row = FORMATS[id]
    missing = [n for f, (n, _) in row.parts.items() if n not in parts and f not in row.optional]
    if missing or "weight" not in parts:
        raise ValueError(f"{id} needs {[*missing, 'weight'][0]}, which is not there")
    weight = parts["weight"]
    if weight.dtype not in (row.storage, torch.uint8, torch.int8):
        raise ValueError(f"weight is {weight.dtype}, {id} stores {row.storage}")
    if tuple(weight.shape) not in row.shapes(*shape):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, which holds no {id} layer of N={shape[0]}, K={shape[1]}"
        )
    values = {}
    for name, (stored, view) in row.parts.items():
        tensor = parts.get(stored)
        values[name] = tensor.view(view) if tensor is not None and view is not None else tensor
    try:
        params = get_layout_class(row.layout).Params(
            **values, **row.options(config), orig_dtype=dtype, orig_shape=shape
        )
    except KeyError as e:
        raise ValueError(f"{id} needs ComfyUI, which brings its layout") from e
    return QuantizedTensor(weight.view(row.storage), row.layout, params)
