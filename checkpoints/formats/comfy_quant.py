"""ComfyUI's per-layer contract: a U8 tensor ``<layer>.comfy_quant`` holds JSON whose ``format`` names the rest.

    svdquant_w4a4    weight I8 (N, K/2) natural, or (N/128, K/64, 32, 128) with "layout": "kitchen_tile_packed_w4a4"
                     weight_scale (K/64, N) | (N/128, K/64, 128) tile-packed
                     smooth_factor (K,)   proj_down (K, R)   proj_up (N, R) | (N/128, R, 128)   bias (N,) optional
                     JSON: act_unsigned (false), lowrank_branch_input_basis "raw" | "post_smoothing"
    awq_w4a16        weight I8 (N, K/2)   weight_scale (K/g, N)   weight_zero (K/g, N)   bias optional
                     JSON: group_size g, a multiple of 64; read as 64, each scale repeated

This pack adds what it takes to write any file that it reads without loss. Other readers refuse these by name, which is
right: run as something else they would be wrong.

    svdquant_nvfp4   weight U8 (N, K/2)   weight_scale F8_E4M3, blocked   weight_channel_scale F32 (N,)
                     smooth_factor (K,)   proj_down (K, R)   proj_up (N, R)
    weight_only      weight U8 (N, bytes)   absmax F32 and quant_map F32 (16,) for nf4 and fp4
                     JSON: codec, out_features, in_features, block
    nibble_parts     JSON: axis "rows" | "columns", parts (a count); the parts are layers <layer>.parts.0, .1 ... of the
                     formats above; proj_down (K, r), proj_up (N, r) optional
                     weight U8 (N, 0): no bytes, but ComfyUI knows a layer by this name only (LoRA, hooks, merges)
    nibble_low_rank  a layer of a format without a branch, and one: JSON base, the JSON of that format; its tensors;
                     proj_down (K, r), proj_up (N, r). For awq_w4a16, weight_only and ComfyUI's own (core_quant.py)

ComfyUI's own formats are left for it, unless a low-rank branch of another pack lies beside one: ``svdq_l1`` (N, R) and
``svdq_l2`` (R, K), y + (x l2^T) l1^T. kitchen's own names of the parts (weight_smooth_factor, weight_zeros ...) are
read too, and awq_w4a16 with proj_down, proj_up as this pack's 0.1.0 wrote it. An empty comfy_quant marks nothing.
Sources: Comfy-Org/ComfyUI PR 13580, comfy-quants, Krea-2-SVDQuant.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import replace

import torch
from torch import Tensor

from ...quant import nvfp4_lowrank, packing
from ...quant.awq import AWQWeight
from ...quant.core_low_rank import CoreLowRankWeight
from ...quant.nvfp4_lowrank import NVFP4LowRankWeight
from ...quant.parts import ROWS, Parts, Plain
from ...quant.schemes import GROUP
from ...quant.svdquant import SVDQuantWeight
from ...quant.weight_only import BNB, WeightOnly
from ..errors import CheckpointError, naming
from . import core_quant
from .stored import StoredLayer, encode_config

SUFFIX = ".comfy_quant"
TILED = "kitchen_tile_packed_w4a4"
SVDQUANT, AWQ, NVFP4, WEIGHT_ONLY = "svdquant_w4a4", "awq_w4a16", "svdquant_nvfp4", "weight_only"
PARTS, LOW_RANK = "nibble_parts", "nibble_low_rank"
OURS = (SVDQUANT, AWQ, NVFP4, WEIGHT_ONLY, LOW_RANK, PARTS)
# What ComfyUI reads by itself (0.33): these layers are none of our business.
CORE = tuple(core_quant.FORMATS)
MAX_CONFIG = 65_536
BRANCH = ("proj_down", "proj_up")
SIDES = {
    SVDQUANT: ("weight_scale", "smooth_factor", *BRANCH),
    AWQ: ("weight_scale", "weight_zero", *BRANCH),
    NVFP4: ("weight_scale", "weight_channel_scale", "smooth_factor", *BRANCH),
    WEIGHT_ONLY: ("absmax", "quant_map"),
}
OPTIONAL = {AWQ: BRANCH, WEIGHT_ONLY: ("absmax", "quant_map")}
# name -> what kitchen's own state dicts call it
KITCHEN = {"weight_zero": "weight_zeros"} | {n: f"weight_{n}" for n in ("smooth_factor", *BRANCH)}
FOREIGN_UP, FOREIGN_DOWN = "svdq_l1", "svdq_l2"
MAX_PARTS = 16
CONVERT = "Write the file again with this pack's quantizer, or load it with the pack that made it"
AGAIN = "Download or write the file again"


def decode_config(tensor: Tensor, file: str, layer: str) -> dict:
    """The layer's JSON. Raises CheckpointError unless it is a small object with a ``format``."""
    if tensor.dtype != torch.uint8 or tensor.numel() > MAX_CONFIG:
        raise CheckpointError(file, "its comfy_quant entry is not small uint8 JSON", CONVERT, layer)
    try:
        config = json.loads(bytes(tensor.cpu().flatten().tolist()))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(file, f"its comfy_quant entry is not JSON ({e})", CONVERT, layer) from e
    if not isinstance(config, dict) or not isinstance(config.get("format"), str):
        raise CheckpointError(file, "its comfy_quant entry names no format", CONVERT, layer)
    return config


def detect(names: Mapping[str, object]) -> bool:
    """Whether any layer in ``names`` follows this contract."""
    return any(n.endswith((SUFFIX, f".{FOREIGN_UP}", f".{FOREIGN_DOWN}")) for n in names)


def read(tensors: MutableMapping[str, Tensor], file: str, core: Collection[str] = CORE) -> dict[str, StoredLayer]:
    """Takes every layer of ours out of ``tensors`` (their comfy_quant, weight and sides; biases stay) and returns them.

    Layers in the formats ``core``, which ComfyUI loads by itself, stay in ``tensors``. Raises CheckpointError naming
    the layer for an unknown format, a missing tensor or a wrong shape.
    """
    found, whole = {}, {}
    for key in [k for k in tensors if k.endswith(SUFFIX)]:
        layer = key.removesuffix(SUFFIX)
        if not tensors[key].numel():
            del tensors[key]
            continue
        config = decode_config(tensors[key], file, layer)
        if config["format"] == PARTS:
            whole[layer] = config
            del tensors[key]
        elif config["format"] in OURS:
            del tensors[key]
            found[layer] = _read_layer(tensors, layer, config, file)
        elif _foreign_branch(tensors, layer, config, file):
            del tensors[key]
            found[layer] = StoredLayer(_beside(tensors, layer, config, file), form=LOW_RANK)
        elif config["format"] not in core:
            known = ", ".join([*OURS, *core])
            what = f"format {config['format']!r} is unknown to this version, which reads {known}"
            raise CheckpointError(file, what, "Update this pack, or load the file with the pack that made it", layer)
    lost = next((n for n in tensors if n.endswith((f".{FOREIGN_UP}", f".{FOREIGN_DOWN}"))), None)
    if lost is not None:
        what = "a low-rank branch lies beside it, and nothing says in which format the layer is"
        raise CheckpointError(file, what, CONVERT, lost.rpartition(".")[0])
    for layer, config in whole.items():
        found[layer] = _read_parts(tensors, found, layer, config, file)
    return found


def take_core(tensors: MutableMapping[str, Tensor], file: str) -> dict[str, core_quant.StoredCore]:
    """Takes the layers that `read` leaves for ComfyUI out of ``tensors``, for whoever runs them without it. Raises
    CheckpointError for a format that is not ComfyUI's of 0.33.
    """
    out = {}
    for key in [k for k in tensors if k.endswith(SUFFIX)]:
        layer = key.removesuffix(SUFFIX)
        config = decode_config(tensors.pop(key), file, layer)
        if config["format"] not in CORE:
            raise CheckpointError(file, f"only ComfyUI runs its format {config['format']!r}", "Use it there", layer)
        out[layer] = core_quant.take(tensors, layer, config)
    return out


def _foreign_branch(tensors: Mapping[str, Tensor], layer: str, config: dict, file: str) -> bool:
    """Whether another pack has put a branch beside a layer of ComfyUI's formats. Raises CheckpointError for half a
    branch, or none where the JSON promises one.
    """
    halves = [f"{layer}.{n}" in tensors for n in (FOREIGN_UP, FOREIGN_DOWN)]
    if any(halves) != all(halves) or (config.get("svdquant") is True and not any(halves)):
        raise CheckpointError(file, "its low-rank branch is not whole (svdq_l1, svdq_l2)", AGAIN, layer)
    if any(halves) and config["format"] not in CORE:
        what = f"a low-rank branch lies beside a layer in the format {config['format']!r}"
        raise CheckpointError(file, what, CONVERT, layer)
    return any(halves)


def _beside(tensors: MutableMapping[str, Tensor], layer: str, config: dict, file: str) -> CoreLowRankWeight:
    """A layer of ComfyUI's formats with its branch, under either spelling of the branch."""
    row = core_quant.FORMATS[config["format"]]
    names = ("weight", *(n for n, _ in row.parts.values()), *core_quant.EXTRAS, *BRANCH, FOREIGN_UP, FOREIGN_DOWN)
    parts = {n: tensors.pop(f"{layer}.{n}") for n in names if f"{layer}.{n}" in tensors}
    if FOREIGN_UP not in parts and not all(n in parts for n in BRANCH):
        raise CheckpointError(file, f"{LOW_RANK} needs {' and '.join(BRANCH)}", CONVERT, layer)
    with naming(file, CONVERT, layer):
        up = parts.pop(FOREIGN_UP) if FOREIGN_UP in parts else parts.pop("proj_up")
        down = parts.pop(FOREIGN_DOWN).t().contiguous() if FOREIGN_DOWN in parts else parts.pop("proj_down")
        extras = {n: parts.pop(n, None) for n in core_quant.EXTRAS}
        base = core_quant.build(config, parts, (up.shape[0], down.shape[0]), up.dtype)
        full = bool(config.get(core_quant.FULL_PRECISION, False))
        return CoreLowRankWeight(base, down, up, **extras, full_precision=full)


def _read_parts(tensors: MutableMapping[str, Tensor], found: dict, layer: str, config: dict, file: str) -> StoredLayer:
    """A layer whose parts have been read already. They leave ``found``."""
    count = config.get("parts")
    names = [f"{layer}.parts.{i}" for i in range(count)] if isinstance(count, int) and 0 < count <= MAX_PARTS else []
    gone = next((n for n in names if n not in found), None)
    if gone or not names:
        what = f"its part {gone} is not there" if gone else f"it says that it has {str(count)[:20]} parts"
        raise CheckpointError(file, what, CONVERT, layer)
    tensors.pop(f"{layer}.weight", None)
    branch = [tensors.pop(f"{layer}.{n}", None) for n in BRANCH]
    with naming(file, CONVERT, layer):
        return StoredLayer(Parts(tuple(found.pop(n).weight for n in names), str(config.get("axis")), *branch))


def _read_layer(tensors: MutableMapping[str, Tensor], layer: str, config: dict, file: str) -> StoredLayer:
    fmt, parts = config["format"], {}
    if fmt == LOW_RANK:
        return _read_low_rank(tensors, layer, config, file)
    for name in ("weight", *SIDES[fmt]):
        value = tensors.pop(f"{layer}.{name}", None)
        if value is None and name in KITCHEN:
            value = tensors.pop(f"{layer}.{KITCHEN[name]}", None)
        if value is None and name not in OPTIONAL.get(fmt, ()):
            raise CheckpointError(file, f"{fmt} needs {name}, which is not there", CONVERT, layer)
        parts[name] = value
    weight = parts.pop("weight")
    if weight.dtype not in (torch.int8, torch.uint8):
        raise CheckpointError(file, f"weight is {weight.dtype}, {fmt} stores int8", CONVERT, layer)
    with naming(file, CONVERT, layer):
        read = READ[fmt](weight.view(torch.int8), parts, config)
        return StoredLayer(read, fmt == SVDQUANT and config.get("layout") == TILED)


def _read_low_rank(tensors: MutableMapping[str, Tensor], layer: str, config: dict, file: str) -> StoredLayer:
    """A layer of a format that has no branch, and its branch."""
    base = config.get("base")
    fmt = base.get("format") if isinstance(base, dict) else None
    if fmt in CORE:
        return StoredLayer(_beside(tensors, layer, base, file))
    if fmt not in (AWQ, WEIGHT_ONLY):
        raise CheckpointError(file, f"its branch lies beside the format {str(fmt)[:40]!r}", CONVERT, layer)
    branch = [tensors.pop(f"{layer}.{n}", None) for n in BRANCH]
    if any(b is None for b in branch):
        raise CheckpointError(file, f"{LOW_RANK} needs {' and '.join(BRANCH)}", CONVERT, layer)
    weight = _read_layer(tensors, layer, base, file).weight
    with naming(file, CONVERT, layer):
        if isinstance(weight, AWQWeight):
            return StoredLayer(replace(weight, proj_down=branch[0], proj_up=branch[1]))
        return StoredLayer(Parts((weight,), ROWS, *branch))


def _read_svdquant(weight: Tensor, parts: Mapping[str, Tensor], config: Mapping) -> SVDQuantWeight:
    scale, up, down = parts["weight_scale"], parts["proj_up"], parts["proj_down"]
    layout = config.get("layout", "natural")
    if weight.dim() != (4 if layout == TILED else 2):
        raise ValueError(f"weight has {weight.dim()} dimensions, which is not what layout {layout!r} stores")
    if layout == TILED:
        weight, scale, up = packing.untile_weight(weight), packing.untile_scales(scale), packing.untile_up(up)
    smooth = parts["smooth_factor"]
    basis = config.get("lowrank_branch_input_basis", "raw")
    if basis == "post_smoothing":
        down = (down.float() / smooth.float().unsqueeze(1)).to(down.dtype)
    elif basis != "raw":
        raise ValueError(f"lowrank_branch_input_basis {basis!r} is neither 'raw' nor 'post_smoothing'")
    return SVDQuantWeight(weight, scale, smooth, down, up, bool(config.get("act_unsigned", False)))


def _read_awq(weight: Tensor, parts: Mapping[str, Tensor], config: Mapping) -> AWQWeight:
    """Groups of 128 and more are groups of 64 that share their scale and zero."""
    scale, zero = parts["weight_scale"], parts["weight_zero"]
    groups = weight.shape[1] * 2 // GROUP
    if scale.dim() == 2 and 0 < scale.shape[0] < groups and groups % scale.shape[0] == 0:
        scale, zero = (t.repeat_interleave(groups // t.shape[0], 0) for t in (scale, zero))
    return AWQWeight(weight, scale, zero, parts["proj_down"], parts["proj_up"])


def _read_nvfp4(weight: Tensor, parts: Mapping[str, Tensor], config: Mapping) -> NVFP4LowRankWeight:
    n, groups = weight.shape[0], weight.shape[1] * 2 // nvfp4_lowrank.GROUP
    scale = nvfp4_lowrank.unblocked(parts["weight_scale"], n, groups)
    sides = (parts[n] for n in ("weight_channel_scale", "smooth_factor", *BRANCH))
    return NVFP4LowRankWeight(weight.view(torch.uint8), scale, *sides)


def _read_weight_only(weight: Tensor, parts: Mapping[str, Tensor], config: Mapping) -> WeightOnly:
    sizes = [config.get(k, 0) for k in ("out_features", "in_features", "block")]
    if not all(isinstance(s, int) and 0 <= s < 2**31 for s in sizes):
        raise ValueError(f"its sizes {sizes} are not whole numbers")
    n, k, block = sizes
    codec = str(config.get("codec"))
    return WeightOnly(codec, (n, k), weight.view(torch.uint8), parts["absmax"], parts["quant_map"], block)


READ = {SVDQUANT: _read_svdquant, AWQ: _read_awq, NVFP4: _read_nvfp4, WEIGHT_ONLY: _read_weight_only}


def config(fmt: str, act_unsigned: bool = False, tiled: bool = False) -> dict:
    """The JSON of a layer in ``fmt``."""
    if fmt != SVDQUANT:
        return {"format": fmt, "group_size": GROUP} if fmt == AWQ else {"format": fmt}
    out = {"format": SVDQUANT, "group_size": GROUP, "act_unsigned": act_unsigned, "lowrank_branch_input_basis": "raw"}
    return {**out, "layout": TILED} if tiled else out


def write(layer: str, weight: Plain | Parts | CoreLowRankWeight, tiled: bool = False) -> dict[str, Tensor]:
    """The tensors of one layer under ``layer`` in this contract, without bias. ``tiled`` asks for tile-packed
    svdquant_w4a4.
    """
    if isinstance(weight, Parts) and len(weight.parts) > 1:
        return _write_parts(layer, weight)
    entry, parts = _entry(weight, tiled)
    parts["comfy_quant"] = encode_config(entry)
    return {f"{layer}.{name}": t.contiguous() for name, t in parts.items()}


def _entry(weight: Plain | Parts | CoreLowRankWeight, tiled: bool = False) -> tuple[dict, dict[str, Tensor]]:
    """(JSON, name -> tensor) of a layer that is one weight."""
    if isinstance(weight, Parts):
        return _with_branch(weight.parts[0], weight)
    if isinstance(weight, AWQWeight):
        if weight.proj_down is not None:
            return _with_branch(replace(weight, proj_down=None, proj_up=None), weight)
        return config(AWQ), {"weight": weight.qweight, "weight_scale": weight.wscales, "weight_zero": weight.wzeros}
    return _svdquant_entry(weight, tiled) if isinstance(weight, SVDQuantWeight) else WRITE[type(weight)](weight)


def _with_branch(base: Plain, whole) -> tuple[dict, dict[str, Tensor]]:
    """A weight without a branch of its own, and the branch of ``whole`` where that has one."""
    entry, parts = _entry(base)
    if whole.proj_down is None:
        return entry, parts
    return {"format": LOW_RANK, "base": entry}, parts | {n: getattr(whole, n) for n in BRANCH}


def _svdquant_entry(w: SVDQuantWeight, tiled: bool) -> tuple[dict, dict[str, Tensor]]:
    qweight, scale, up = w.qweight, w.wscales, w.proj_up
    if tiled:
        qweight, scale, up = packing.tile_weight(qweight), packing.tile_scales(scale), packing.tile_up(up)
    parts = {"weight": qweight, "weight_scale": scale, "smooth_factor": w.smooth_factor}
    return config(SVDQUANT, w.act_unsigned, tiled), parts | {"proj_down": w.proj_down, "proj_up": up}


def _nvfp4_entry(w: NVFP4LowRankWeight) -> tuple[dict, dict[str, Tensor]]:
    parts = {"weight": w.qweight, "weight_scale": nvfp4_lowrank.blocked(w.block_scale)}
    parts |= {"weight_channel_scale": w.channel_scale, "smooth_factor": w.smooth_factor}
    return {"format": NVFP4, "group_size": nvfp4_lowrank.GROUP}, parts | {n: getattr(w, n) for n in BRANCH}


def _weight_only_entry(w: WeightOnly) -> tuple[dict, dict[str, Tensor]]:
    entry = {"format": WEIGHT_ONLY, "codec": w.codec, "out_features": w.shape[0], "in_features": w.shape[1]}
    if w.codec not in BNB:
        return entry, {"weight": w.qdata}
    return entry | {"block": w.block}, {"weight": w.qdata, "absmax": w.absmax, "quant_map": w.table}


def _core_entry(w: CoreLowRankWeight) -> tuple[dict, dict[str, Tensor]]:
    entry = core_quant.config_of(w.base)
    if w.full_precision:
        entry[core_quant.FULL_PRECISION] = True
    parts = core_quant.parts_of(w.base)
    parts |= {n: t for n in core_quant.EXTRAS if (t := getattr(w, n)) is not None}
    return {"format": LOW_RANK, "base": entry}, parts | {n: getattr(w, n) for n in BRANCH}


WRITE = {NVFP4LowRankWeight: _nvfp4_entry, WeightOnly: _weight_only_entry, CoreLowRankWeight: _core_entry}


def _write_parts(layer: str, weight: Parts) -> dict[str, Tensor]:
    out = {f"{layer}.weight": torch.empty(weight.shape[0], 0, dtype=torch.uint8)}
    for i, part in enumerate(weight.parts):
        out |= write(f"{layer}.parts.{i}", part)
    if weight.proj_down is not None:
        out |= {f"{layer}.{n}": getattr(weight, n).contiguous() for n in BRANCH}
    n, k = weight.shape
    entry = {"format": PARTS, "axis": weight.axis, "parts": len(weight.parts), "out_features": n, "in_features": k}
    return out | {f"{layer}.comfy_quant": encode_config(entry)}
