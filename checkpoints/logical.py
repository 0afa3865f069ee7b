"""N and K of a quantized layer, from its own tensors: one format may store codes of several widths.

svdquant_w4a4, svdquant_nvfp4   smooth_factor (K,)
awq_w4a16                       weight_scale (K / group_size, N)
asym_w4a8_int8                  weight_s_rel (N, K / group_size): the codes are K/2 bytes a row, or 3K/4 at 6 bits
nvfp4                           two codes a byte; its blocked scales are padded and tell nothing. N as its bias has
                                it, since rows are padded to 16
convrot_w4a4                    two codes a byte, and no tensor that tells K
weight_only                     its JSON
int8_tensorwise, fp8, mxfp8     as stored
"""

from __future__ import annotations

from collections.abc import Mapping

from .formats import comfy_quant
from .header import Entry

PAIRS = ("nvfp4", "convrot_w4a4", comfy_quant.SVDQUANT, comfy_quant.AWQ, comfy_quant.NVFP4)  # two codes a byte
# format -> a side of one row (or column) a group, its axis of groups, the group size where the JSON has none
GROUPS = {comfy_quant.AWQ: ("weight_scale", 0, 64), "asym_w4a8_int8": ("weight_s_rel", 1, 16)}


def shapes(tensors: Mapping[str, Entry], configs: Mapping[str, Mapping]) -> dict[str, tuple[int, ...]]:
    """Tensor shapes with each quantized weight's as (N, K), whatever its storage. ``configs``: layer -> its JSON."""
    out = {n: e.shape for n, e in tensors.items()}
    for layer, config in configs.items():
        if f"{layer}.weight" in out and config.get("format") != comfy_quant.PARTS:
            out[f"{layer}.weight"] = shape(tensors, layer, config)
    for layer, names in parts(configs).items():
        found = [out.pop(f"{n}.weight", ()) for n in names]
        if found and all(len(s) == 2 for s in found):
            n, k = ([s[i] for s in found] for i in (0, 1))
            whole = (n[0], sum(k)) if configs[layer].get("axis") == "columns" else (sum(n), k[0])
            out[f"{layer}.weight"] = whole
    return out


def parts(configs: Mapping[str, Mapping]) -> dict[str, list[str]]:
    """A layer of several -> those, by name, as far as they have an entry of their own."""
    out = {}
    for layer, config in configs.items():
        if config.get("format") == comfy_quant.PARTS:
            count = config.get("parts")
            names = (f"{layer}.parts.{i}" for i in range(min(count, 64) if isinstance(count, int) else 0))
            out[layer] = [n for n in names if n in configs]
    return out


def shape(tensors: Mapping[str, Entry], layer: str, config: Mapping) -> tuple[int, ...]:
    """(N, K) of one layer; the stored shape where its format does not pack."""
    if isinstance(config.get("base"), Mapping):
        config = config["base"]
    fmt, stored = config.get("format"), tensors[f"{layer}.weight"].shape
    if fmt == comfy_quant.WEIGHT_ONLY:
        return config.get("out_features", 0), config.get("in_features", 0)
    if len(stored) == 4:  # tile-packed
        return stored[0] * 128, stored[1] * 64
    if len(stored) != 2 or tensors[f"{layer}.weight"].dtype not in ("I8", "U8"):
        return stored
    n, k = stored[0], (2 * stored[1] if fmt in PAIRS else stored[1])
    if fmt in GROUPS:
        name, axis, default = GROUPS[fmt]
        side = tensors.get(f"{layer}.{name}")
        if side is not None and len(side.shape) == 2:
            k = side.shape[axis] * _group(config, default)
    smooth = tensors.get(f"{layer}.smooth_factor", tensors.get(f"{layer}.weight_smooth_factor"))
    if fmt in (comfy_quant.SVDQUANT, comfy_quant.NVFP4) and smooth is not None and len(smooth.shape) == 1:
        k = smooth.shape[0]
    bias = tensors.get(f"{layer}.bias")
    if fmt == "nvfp4" and bias is not None and len(bias.shape) == 1 and n - 16 < bias.shape[0] <= n:
        n = bias.shape[0]
    return n, k


def _group(config: Mapping, default: int) -> int:
    """A layer's group size as ComfyUI reads it: in its JSON, or in ``params`` there."""
    params = config.get("params")
    value = config.get("group_size", params.get("group_size") if isinstance(params, Mapping) else None)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**16 else default
