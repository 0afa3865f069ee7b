"""What a file says of its layers: in metadata and config.json, by a layer's own entry, by the types and names of its
tensors. Layers that nothing here can read are refused by their marks; and codes are told from a float model's numbers,
which they would be taken for without a complaint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from .errors import CheckpointError
from .formats import bnb, nunchaku

Entries = Mapping[str, tuple[str, tuple[int, ...]]]
LITE = "nunchaku_lite"
MAKER = "Load it with the pack that made it"
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


@dataclass(frozen=True)
class Marks:
    """``config``: the diffusers config; ``quantization``: its or the metadata's quantization_config."""

    config: Mapping
    quantization: Mapping
    model_class: str = ""
    lite: bool = False


def object_of(metadata: Mapping[str, str], key: str) -> dict:
    """The JSON object under ``key``; {} for anything else: other programs keep other things under these names."""
    try:
        value = json.loads(metadata.get(key) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read(metadata: Mapping[str, str], config: Mapping | None, file: str) -> Marks:
    """The marks of a file. Raises CheckpointError for layouts that are not read here."""
    found = dict(config or object_of(metadata, "config"))
    inner = found.get("quantization_config")
    quantization = inner if isinstance(inner, dict) else object_of(metadata, "quantization_config")
    targets = quantization.get("targets")
    if isinstance(targets, list):
        _check_targets(targets, file)
    method = quantization.get("quant_method")
    if method == "sdnq":
        raise CheckpointError(file, "it is an SDNQ model, which this version does not read", "Load it with SDNQ")
    lite = method == LITE or isinstance(targets, list)
    return Marks(found, quantization, str(metadata.get("model_class", "")), lite)


def _check_targets(targets: list, file: str) -> None:
    """diffuse-compressor's files: "logical" layers have the packed ones' names and shapes, and other numbers."""
    for target in targets:
        layout = target.get("runtime_tensor_layout") if isinstance(target, dict) else None
        scheme = target.get("weight_layout") if isinstance(target, dict) else None
        kind = scheme.get("name") if isinstance(scheme, dict) else scheme
        if layout != "nunchaku_packed" or kind not in ("svdq", "awq_w4a16", None):
            what = f"diffuse-compressor wrote it in the layout {str(layout)[:40]!r} ({str(kind)[:40]}), not packed"
            raise CheckpointError(file, what, "Export it as nunchaku_packed, or load it with the pack that made it")


@dataclass(frozen=True)
class Stranger:
    """A kind of layer that is known by name and not read. ``test`` on {last name: (dtype, shape)}."""

    title: str
    test: Callable[[Mapping], bool]
    what: str
    remedy: str = MAKER


def _has(parts: Mapping, *names: str) -> bool:
    return all(n in parts for n in names)


FP8_SCALES = ("weight_scale", "weight_scale_inv", "scale_weight")
SCALED_FP8 = "scaled_fp8"  # the older mark, of all layers below its own name
STRANGERS = (
    Stranger(
        "kitchen svdquant_w4a4 without its description",
        lambda p: _has(p, "weight", "weight_scale", "proj_down", "proj_up") and "comfy_quant" not in p,
        "its SVDQuant layers have no comfy_quant entry, so nothing says how their activations are rounded",
        "Write the file again with its quantizer's ComfyUI export",
    ),
    Stranger(
        "NVFP4 without its description",
        lambda p: _has(p, "weight", "weight_scale", "weight_scale_2") and "comfy_quant" not in p
        and p["weight"][0] == "U8" and p["weight_scale"][0] == "F8_E4M3",
        "its NVFP4 layers have no comfy_quant entry, so nothing says in which order their scales lie",
        "Take the model's ComfyUI version, or export it again for ComfyUI",
    ),
    Stranger("SDNQ", lambda p: _has(p, "weight", "scale", "zero_point") or _has(p, "weight", "svd_up", "svd_down"),
             "it is an SDNQ layer, which this version does not read", "Load it with SDNQ"),
    Stranger(
        "integer weights without their description",
        lambda p: "comfy_quant" not in p and _has(p, "weight") and p["weight"][0] in ("I8", "U8")
        and (len(p["weight"][1]) > 1 or any(n.startswith("weight_") for n in p)),
        "its weights are integers, and it has no comfy_quant entry, so nothing says what they stand for",
        "Take the model's ComfyUI version, or export it again for ComfyUI",
    ),
    Stranger(
        "scaled fp8 without its description",
        lambda p: "comfy_quant" not in p and _has(p, "weight") and p["weight"][0].startswith("F8")
        and any(n in p for n in FP8_SCALES),
        "its fp8 weight has a scale beside it, and neither a comfy_quant entry nor the mark scaled_fp8: "
        "ComfyUI would leave the scale out",
        "Take the model's ComfyUI version, or export it again for ComfyUI",
    ),
    Stranger("HQQ", lambda p: _has(p, "W_q", "scale", "zero"), "it is an HQQ layer, which this version does not read"),
)  # fmt: skip


def layers_of(what: Entries, split: Callable = lambda name: name.rpartition(".")[::2]) -> dict[str, dict[str, tuple]]:
    """Layer -> {last name: (dtype, shape)}. ``split``: a tensor's name -> these two."""
    out: dict[str, dict[str, tuple]] = {}
    for name, entry in what.items():
        layer, last = split(name)
        out.setdefault(layer, {})[last] = entry
    return out


def refuse(what: Entries, marks: Marks, file: str) -> None:
    """Raises CheckpointError for the first layer that nothing here reads."""
    by_layer, codes = layers_of(what), bnb.layers(what)
    marked = tuple(n.removesuffix(SCALED_FP8) for n in what if n.endswith(SCALED_FP8))
    for layer, parts in by_layer.items():
        if "qweight" in parts and ("weight" in parts or "comfy_quant" in parts):
            raise CheckpointError(file, "two formats claim this layer", "Download or write the file again", layer)
        if "qweight" in parts:
            found = nunchaku.refusal(parts)
            if found is not None:
                raise CheckpointError(file, found[0], found[1], layer)
        scaled = layer.startswith(marked) and parts.get("weight", ("",))[0].startswith("F8")
        stranger = next((s for s in STRANGERS if s.test(parts)), None)
        if stranger is not None and not scaled and layer not in codes:
            raise CheckpointError(file, stranger.what, stranger.remedy, layer)
    if not marks.lite:
        _refuse_lost_lite(by_layer, file)


def _refuse_lost_lite(by_layer: Mapping[str, Mapping], file: str) -> None:
    """A Lite file without its config.json looks like nunchaku's own, whose activations differ. Its q, k and v are
    apart.

    (attn2.to_q of a UNet stands alone in either.)
    """
    for layer, parts in by_layer.items():
        stem, _, last = layer.rpartition(".")
        if last == "to_k" and "qweight" in parts and "qweight" in by_layer.get(f"{stem}.to_q", {}):
            what = "it is part of a diffusers Nunchaku Lite folder, and the config.json of that folder is not beside it"
            raise CheckpointError(file, what, "Put the folder's config.json next to the file", layer)


def first_quantized(what: Entries, listed: Mapping[str, str], read: Callable[[str], str]) -> tuple[str, str] | None:
    """(layer, what it is) of the first quantized layer, or None.

    ``listed``: layer -> format as the file's metadata lists them; ``read``: a layer -> the format in its own entry.
    """
    if listed:
        layer, fmt = next(iter(listed.items()))
        return layer, f"{fmt[:60]}, as the file's metadata says"
    whole = None
    for layer, parts in layers_of(what, layer_of).items():
        if "comfy_quant" in parts:
            return layer, read(layer)[:60]
        found = quantized_as(parts)
        if found is not None and "scaled_fp8" not in parts:
            return layer, found
        whole = whole or (found and (layer, found))  # says it of all layers: one that is named tells more
    return whole


def layer_of(name: str) -> tuple[str, str]:
    """(layer, last name) of a tensor; what bitsandbytes keeps below ``.weight`` belongs to the layer."""
    layer, _, last = (name.split(bnb.MARK)[0], "", "quant_map") if bnb.MARK in name else name.rpartition(".")
    return (layer.rpartition(".")[0] if layer.rpartition(".")[2] == "weight" else layer), last


def quantized_as(parts: Mapping[str, tuple]) -> str | None:
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
