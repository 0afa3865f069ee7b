"""ComfyUI's per-layer contract: a U8 tensor ``<layer>.comfy_quant`` holds JSON whose ``format`` names the rest.

    svdquant_w4a4   weight I8 (N, K/2) natural, or (N/128, K/64, 32, 128) with "layout": "kitchen_tile_packed_w4a4"
                    weight_scale (K/64, N) | (N/128, K/64, 128) tile-packed
                    smooth_factor (K,)   proj_down (K, R)   proj_up (N, R) | (N/128, R, 128)   bias (N,) optional
                    JSON: act_unsigned (false), lowrank_branch_input_basis "raw" | "post_smoothing"
    awq_w4a16       weight I8 (N, K/2)   weight_scale (K/64, N)   weight_zero (K/64, N)   bias optional
                    proj_down (K, R), proj_up (N, R) optional (this pack's)

comfy_more.py adds this pack's own. Other formats in the JSON belong to ComfyUI itself and are left for it; kitchen's
own names of the parts (weight_smooth_factor ...) are read too. Source: Comfy-Org/ComfyUI PR 13580, comfy-quants.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from ...quant import packing
from ...quant.awq import AWQWeight
from ...quant.parts import Parts, Plain
from ...quant.svdquant import SVDQuantWeight
from ..errors import CheckpointError
from . import comfy_more
from .stored import StoredLayer

SUFFIX = ".comfy_quant"
TILED = "kitchen_tile_packed_w4a4"
SVDQUANT, AWQ = "svdquant_w4a4", "awq_w4a16"
OURS = (SVDQUANT, AWQ, *comfy_more.READ, comfy_more.PARTS)
# What ComfyUI reads by itself (0.33): these layers are none of our business.
CORE = ("float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4", "int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8")
MAX_CONFIG = 65_536
SIDES = {
    SVDQUANT: ("weight_scale", "smooth_factor", "proj_down", "proj_up"),
    AWQ: ("weight_scale", "weight_zero", "proj_down", "proj_up"),
    **comfy_more.SIDES,
}
OPTIONAL = {SVDQUANT: (), AWQ: ("proj_down", "proj_up"), comfy_more.NVFP4: (), **comfy_more.OPTIONAL}
# name -> what kitchen's own state dicts call it
KITCHEN = {"weight_zero": "weight_zeros"} | {n: f"weight_{n}" for n in ("smooth_factor", "proj_down", "proj_up")}
MAX_PARTS = 16
CONVERT = "Write the file again with this pack's quantizer, or load it with the pack that made it"


def encode_config(config: dict) -> Tensor:
    """JSON as the (len,) uint8 tensor of the contract."""
    return torch.tensor(list(json.dumps(config, sort_keys=True).encode()), dtype=torch.uint8)


def decode_config(tensor: Tensor, file: str, layer: str) -> dict:
    """The layer's JSON. Raises CheckpointError unless it is a small object with a ``format``."""
    if tensor.dtype != torch.uint8 or tensor.numel() > MAX_CONFIG:
        raise CheckpointError(file, "its comfy_quant entry is not small uint8 JSON", CONVERT, layer)
    try:
        config = json.loads(bytes(tensor.cpu().flatten().tolist()))
    except ValueError as e:
        raise CheckpointError(file, f"its comfy_quant entry is not JSON ({e})", CONVERT, layer) from e
    if not isinstance(config, dict) or not isinstance(config.get("format"), str):
        raise CheckpointError(file, "its comfy_quant entry names no format", CONVERT, layer)
    return config


def detect(names: Mapping[str, object]) -> bool:
    """Whether any layer in ``names`` follows this contract."""
    return any(n.endswith(SUFFIX) for n in names)


def read(tensors: MutableMapping[str, Tensor], file: str) -> dict[str, StoredLayer]:
    """Takes every 4-bit layer of ours out of ``tensors`` (their comfy_quant, weight and sides; biases stay) and returns
    them.

    Layers in ComfyUI's own formats stay in ``tensors``. Raises CheckpointError naming the layer for an unknown format,
    a missing tensor or a wrong shape.
    """
    found, whole = {}, {}
    for key in [k for k in tensors if k.endswith(SUFFIX)]:
        layer = key.removesuffix(SUFFIX)
        config = decode_config(tensors[key], file, layer)
        if config["format"] == comfy_more.PARTS:
            whole[layer] = config
            del tensors[key]
        elif config["format"] in OURS:
            del tensors[key]
            found[layer] = _read_layer(tensors, layer, config, file)
        elif config["format"] not in CORE:
            known = ", ".join(OURS + CORE)
            what = f"format {config['format']!r} is unknown to this version, which reads {known}"
            raise CheckpointError(file, what, "Update this pack, or load the file with the pack that made it", layer)
    for layer, config in whole.items():
        found[layer] = _read_parts(tensors, found, layer, config, file)
    return found


def _read_parts(tensors: MutableMapping[str, Tensor], found: dict, layer: str, config: dict, file: str) -> StoredLayer:
    """A layer whose parts have been read already. They leave ``found``."""
    count = config.get("parts")
    names = [f"{layer}.parts.{i}" for i in range(count)] if isinstance(count, int) and 0 < count <= MAX_PARTS else []
    gone = next((n for n in names if n not in found), None)
    if gone or not names:
        what = f"its part {gone} is not there" if gone else f"it says that it has {str(count)[:20]} parts"
        raise CheckpointError(file, what, CONVERT, layer)
    branch = [tensors.pop(f"{layer}.{n}", None) for n in ("proj_down", "proj_up")]
    try:
        return StoredLayer(Parts(tuple(found.pop(n).weight for n in names), str(config.get("axis")), *branch))
    except (ValueError, RuntimeError, IndexError, AttributeError, TypeError) as e:
        raise CheckpointError(file, str(e), CONVERT, layer) from e


def _read_layer(tensors: MutableMapping[str, Tensor], layer: str, config: dict, file: str) -> StoredLayer:
    fmt = config["format"]
    parts = {}
    for name in ("weight", *SIDES[fmt]):
        value = tensors.pop(f"{layer}.{name}", None)
        if value is None and name in KITCHEN:
            value = tensors.pop(f"{layer}.{KITCHEN[name]}", None)
        if value is None and name not in OPTIONAL[fmt]:
            raise CheckpointError(file, f"{fmt} needs {name}, which is not there", CONVERT, layer)
        parts[name] = value
    weight = parts.pop("weight")
    if weight.dtype not in (torch.int8, torch.uint8):
        raise CheckpointError(file, f"weight is {weight.dtype}, {fmt} stores int8", CONVERT, layer)
    weight = weight.view(torch.int8)
    tiled = config.get("layout") == TILED
    try:
        if fmt in comfy_more.READ:
            return StoredLayer(comfy_more.READ[fmt](weight, parts, config))
        if fmt == AWQ:
            return StoredLayer(
                AWQWeight(weight, parts["weight_scale"], parts["weight_zero"], parts["proj_down"], parts["proj_up"])
            )
        return StoredLayer(_svdquant(weight, parts, config, tiled), tiled)
    except (ValueError, RuntimeError, IndexError, AttributeError, TypeError) as e:
        raise CheckpointError(file, str(e), CONVERT, layer) from e


def _svdquant(weight: Tensor, parts: dict, config: dict, tiled: bool) -> SVDQuantWeight:
    scale, up, down = parts["weight_scale"], parts["proj_up"], parts["proj_down"]
    if weight.dim() != (4 if tiled else 2):
        raise ValueError(
            f"weight has {weight.dim()} dimensions, which is not what layout {config.get('layout', 'natural')!r} stores"
        )
    if tiled:
        weight, scale, up = packing.untile_weight(weight), packing.untile_scales(scale), packing.untile_up(up)
    smooth = parts["smooth_factor"]
    basis = config.get("lowrank_branch_input_basis", "raw")
    if basis == "post_smoothing":
        down = (down.float() / smooth.float().unsqueeze(1)).to(down.dtype)
    elif basis != "raw":
        raise ValueError(f"lowrank_branch_input_basis {basis!r} is neither 'raw' nor 'post_smoothing'")
    return SVDQuantWeight(weight, scale, smooth, down, up, bool(config.get("act_unsigned", False)))


def config(fmt: str, act_unsigned: bool = False, tiled: bool = False) -> dict:
    """The JSON of a layer in ``fmt``."""
    if fmt != SVDQUANT:
        return {"format": fmt, "group_size": 64} if fmt == AWQ else {"format": fmt}
    out = {"format": SVDQUANT, "group_size": 64, "act_unsigned": act_unsigned, "lowrank_branch_input_basis": "raw"}
    return {**out, "layout": TILED} if tiled else out


def write(layer: str, weight: Plain | Parts, tiled: bool = False) -> dict[str, Tensor]:
    """The tensors of one layer under ``layer`` in this contract, without bias. ``tiled`` asks for tile-packed
    svdquant_w4a4.
    """
    if isinstance(weight, Parts):
        return _write_parts(layer, weight)
    if type(weight) in comfy_more.WRITE:
        entry, parts = comfy_more.WRITE[type(weight)](weight)
        parts["comfy_quant"] = encode_config(entry)
    elif isinstance(weight, AWQWeight):
        parts = {"weight": weight.qweight, "weight_scale": weight.wscales, "weight_zero": weight.wzeros}
        if weight.proj_down is not None:
            parts |= {"proj_down": weight.proj_down, "proj_up": weight.proj_up}
        parts["comfy_quant"] = encode_config(config(AWQ))
    else:
        qweight, scale, up = weight.qweight, weight.wscales, weight.proj_up
        if tiled:
            qweight, scale, up = packing.tile_weight(qweight), packing.tile_scales(scale), packing.tile_up(up)
        parts = {"weight": qweight, "weight_scale": scale, "smooth_factor": weight.smooth_factor}
        parts |= {"proj_down": weight.proj_down, "proj_up": up}
        parts["comfy_quant"] = encode_config(config(SVDQUANT, weight.act_unsigned, tiled))
    return {f"{layer}.{name}": t.contiguous() for name, t in parts.items()}


def _write_parts(layer: str, weight: Parts) -> dict[str, Tensor]:
    out = {}
    for i, part in enumerate(weight.parts):
        out |= write(f"{layer}.parts.{i}", part)
    if weight.proj_down is not None:
        out |= {f"{layer}.proj_down": weight.proj_down.contiguous(), f"{layer}.proj_up": weight.proj_up.contiguous()}
    config = {"format": comfy_more.PARTS, "axis": weight.axis, "parts": len(weight.parts)}
    return out | {f"{layer}.comfy_quant": encode_config(config)}
