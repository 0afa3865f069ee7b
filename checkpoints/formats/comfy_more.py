"""What this pack adds to ComfyUI's per-layer contract, so that any file it reads can be written in it without loss.

    svdquant_nvfp4   weight U8 (N, K/2)   weight_scale F8_E4M3, blocked   weight_channel_scale F32 (N,)
                     smooth_factor (K,)   proj_down (K, R)   proj_up (N, R)
    weight_only      weight U8 (N, bytes)   absmax F32 and quant_map F32 (16,) for nf4 and fp4
                     JSON: codec, out_features, in_features, block
    nibble_parts     JSON: axis "rows" | "columns", parts (a count); the parts are layers <layer>.parts.0, .1 ... of the
                     formats above or comfy_quant's; proj_down (K, r), proj_up (N, r) optional
                     weight U8 (N, 0): no bytes, but ComfyUI knows a layer by this name only (LoRA, hooks, merges)
    nibble_low_rank  a layer of a format without a branch, and one: JSON base, the JSON of that format; its tensors;
                     proj_down (K, r), proj_up (N, r). For awq_w4a16, weight_only and ComfyUI's own (core_quant.py)

Other readers refuse these by name, which is right: run as something else they would be wrong. Used by comfy_quant.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...quant import nvfp4_lowrank
from ...quant.nvfp4_lowrank import NVFP4LowRankWeight
from ...quant.weight_only import BNB, WeightOnly

NVFP4, WEIGHT_ONLY, PARTS, LOW_RANK = "svdquant_nvfp4", "weight_only", "nibble_parts", "nibble_low_rank"
SIDES = {
    NVFP4: ("weight_scale", "weight_channel_scale", "smooth_factor", "proj_down", "proj_up"),
    WEIGHT_ONLY: ("absmax", "quant_map"),
}
OPTIONAL = {WEIGHT_ONLY: ("absmax", "quant_map")}


def read_nvfp4(weight: Tensor, parts: Mapping[str, Tensor], config: Mapping) -> NVFP4LowRankWeight:
    n, groups = weight.shape[0], weight.shape[1] * 2 // nvfp4_lowrank.GROUP
    scale = nvfp4_lowrank.unblocked(parts["weight_scale"], n, groups)
    return NVFP4LowRankWeight(
        weight.view(torch.uint8), scale, parts["weight_channel_scale"], parts["smooth_factor"], parts["proj_down"],
        parts["proj_up"],
    )  # fmt: skip


def read_weight_only(weight: Tensor, parts: Mapping[str, Tensor], config: Mapping) -> WeightOnly:
    sizes = [config.get(k, 0) for k in ("out_features", "in_features", "block")]
    if not all(isinstance(s, int) and 0 <= s < 2**31 for s in sizes):
        raise ValueError(f"its sizes {sizes} are not whole numbers")
    n, k, block = sizes
    codec = str(config.get("codec"))
    return WeightOnly(codec, (n, k), weight.view(torch.uint8), parts["absmax"], parts["quant_map"], block)


READ: dict[str, Callable] = {NVFP4: read_nvfp4, WEIGHT_ONLY: read_weight_only}


def write_nvfp4(w: NVFP4LowRankWeight) -> tuple[dict, dict[str, Tensor]]:
    parts = {"weight": w.qweight, "weight_scale": nvfp4_lowrank.blocked(w.block_scale)}
    parts |= {"weight_channel_scale": w.channel_scale, "smooth_factor": w.smooth_factor}
    return {"format": NVFP4, "group_size": 16}, {**parts, "proj_down": w.proj_down, "proj_up": w.proj_up}


def write_weight_only(w: WeightOnly) -> tuple[dict, dict[str, Tensor]]:
    config = {"format": WEIGHT_ONLY, "codec": w.codec, "out_features": w.shape[0], "in_features": w.shape[1]}
    if w.codec not in BNB:
        return config, {"weight": w.qdata}
    return config | {"block": w.block}, {"weight": w.qdata, "absmax": w.absmax, "quant_map": w.table}


WRITE: dict[type, Callable] = {NVFP4LowRankWeight: write_nvfp4, WeightOnly: write_weight_only}
