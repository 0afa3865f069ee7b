"""Whether a model's weights are quantized: by a layer's own entry, by the file's metadata, by the types of its tensors,
or by tensors beside a weight that only a quantizer writes. Codes taken for numbers quantize without a complaint, and
to noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from .formats import bnb, nunchaku
from .marks import Entries

INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
CODES = ("I8", "U8")
NARROW = ("F8", "F6", "F4")  # floats of less than 16 bits, by how safetensors' names of them begin
FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
BUFFER = 4096  # a matrix of small integers below this size may be a table that is no weight
# What quantizers write beside a layer's weight.
SIDES = (
    "weight_scale", "weight_scale_2", "weight_scale_inv", "weight_s_rel", "weight_s_channel", "weight_codebook",
    "weight_correction", "weight_zero", "weight_zeros", "weight_zero_point", "weight_channel_scale",
    "weight_smooth_factor", "weight_proj_down", "weight_proj_up", "scale_weight", "scale_input", "input_scale",
    "pre_quant_scale", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "smooth_factor",
    "smooth_factor_orig", "smooth", "smooth_orig", "proj_down", "proj_up", "wscales", "wzeros", "wcscales", "wtscale",
    "qzeros", "g_idx", "zero_point", "svd_up", "svd_down", "svdq_l1", "svdq_l2",
)  # fmt: skip
# What stands for a weight, or for a whole model, by itself.
ALONE = ("comfy_quant", "qweight", "W_q", "weight_packed", "scaled_fp8")


def first(what: Entries, listed: Mapping[str, str], read: Callable[[str], str]) -> tuple[str, str] | None:
    """(layer, what it is) of the first quantized layer, or None.

    ``listed``: layer -> format as the file's metadata lists them; ``read``: a layer -> the format in its own entry.
    """
    if listed:
        layer, fmt = next(iter(listed.items()))
        return layer, f"{fmt[:60]}, as the file's metadata says"
    whole = None
    for layer, parts in layers_of(what).items():
        if "comfy_quant" in parts:
            return layer, read(layer)[:60]
        found = kind(parts)
        if found is not None and "scaled_fp8" not in parts:
            return layer, found
        whole = whole or (found and (layer, found))  # says it of all layers: one that is named tells more
    return whole


def layers_of(what: Entries) -> dict[str, dict[str, tuple]]:
    """Layer -> {last name: (dtype, shape)}; what bitsandbytes keeps below ``.weight`` belongs to the layer."""
    out: dict[str, dict[str, tuple]] = {}
    for name, entry in what.items():
        layer, last = layer_of(name)
        out.setdefault(layer, {})[last] = entry
    return out


def layer_of(name: str) -> tuple[str, str]:
    """(layer, last name) of a tensor."""
    layer, _, last = (name.split(bnb.MARK)[0], "", "quant_map") if bnb.MARK in name else name.rpartition(".")
    return (layer.rpartition(".")[0] if layer.rpartition(".")[2] == "weight" else layer), last


def kind(parts: Mapping[str, tuple]) -> str | None:
    """What a layer is, by its tensors {last name: (dtype, shape)}; None for a layer that is not quantized."""
    if "qweight" in parts:
        return nunchaku.kind(parts) or "packed codes under the name qweight"
    dtype, shape = parts.get("weight", ("", ()))
    if dtype in CODES and ("absmax" in parts or "quant_map" in parts):
        return "bitsandbytes codes"
    side = next((n for n in SIDES if n in parts), None)
    if dtype.startswith(NARROW):
        return _narrow(dtype, parts)
    if dtype in INTEGERS and (side or len(shape) > 1):
        return _codes(dtype, parts)
    if dtype and side:
        return f"{side} stands beside its weight"
    alone = next((n for n in ALONE if n in parts), None)
    if alone is not None:
        return f"it holds {alone}"
    for name, (dtype, shape) in parts.items():
        if (dtype in CODES or dtype.startswith(NARROW)) and len(shape) > 1 and prod(shape) >= BUFFER:
            return f"{name} is {dtype}"
    return None


def _narrow(dtype: str, parts: Mapping[str, tuple]) -> str:
    if parts.get("weight_scale", ("",))[0] in ("U8", "F8_E8M0") and dtype == "F8_E4M3":
        return "mxfp8, by its tensors"
    return FP8.get(dtype, f"its weight is {dtype}")


def _codes(dtype: str, parts: Mapping[str, tuple]) -> str:
    """The format of integer weights, as far as the tensors beside them tell."""
    scale = parts.get("weight_scale", ("", ()))
    branch = "proj_down" in parts or "weight_proj_down" in parts
    for fmt, fits in (
        ("asym_w4a8_int8", "weight_s_rel" in parts),
        ("svdquant_nvfp4", branch and "weight_channel_scale" in parts),
        ("awq_w4a16", "weight_zero" in parts or "weight_zeros" in parts),
        ("svdquant_w4a4", branch or "smooth_factor" in parts or "weight_smooth_factor" in parts),
        ("nvfp4", "weight_scale_2" in parts or scale[0].startswith("F8")),
        ("int8_tensorwise or convrot_w4a4", bool(scale[0])),
    ):
        if fits:
            return f"{fmt}, by its tensors"
    return f"its weight is {dtype}"
