"""bitsandbytes 4-bit layers, NF4 and FP4, as diffusers and some single-file checkpoints store them. Kept as they are.

    <layer>.weight                                    U8 (N*K/2, 1) or flat; row-major, the high nibble comes first
    <layer>.weight.absmax                             F32 (N*K/block,), or U8 when nested
    <layer>.weight.quant_map                          F32 (16,)
    <layer>.weight.quant_state.bitsandbytes__nf4      U8, JSON: quant_type, blocksize, shape, dtype (or ...__fp4)
    <layer>.weight.nested_absmax, .nested_quant_map   absmax = map[code] * nested_absmax[i // 256] + nested_offset

W = quant_map[code] * absmax[position // blocksize]. Source: bitsandbytes functional.py (QuantState.from_dict).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from ...quant.weight_only import BNB, WeightOnly
from ..errors import naming
from .stored import StoredLayer, all_finite

TITLE = "bitsandbytes"
MARK = ".weight.quant_state.bitsandbytes__"
REPAIR = "Download the file again, or load it with bitsandbytes itself"
NESTED_BLOCK = 256
SIDES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
MAX_CONFIG = 65_536


def detect(names: Mapping[str, object]) -> bool:
    return any(MARK in n for n in names)


def layers(names: Mapping[str, object]) -> dict[str, str]:
    """Layer -> nf4 or fp4."""
    found = (n.split(MARK, 1) for n in names if MARK in n)
    return {layer: codec for layer, codec in found if codec in BNB}


def state(tensor: Tensor) -> dict:
    """The quant state's JSON. Raises ValueError unless it is a small object with sane sizes."""
    if tensor.dtype != torch.uint8 or tensor.numel() > MAX_CONFIG:
        raise ValueError("its quant state is not small uint8 JSON")
    config = json.loads(bytes(tensor.flatten().tolist()))
    shape, block = (config.get("shape"), config.get("blocksize")) if isinstance(config, dict) else (None, None)
    whole = isinstance(shape, list) and all(isinstance(s, int) and 0 < s < 2**31 for s in [*shape, block or 0])
    if not whole or len(shape) != 2:
        raise ValueError(f"its quant state has shape {str(shape)[:60]} and block size {str(block)[:20]}")
    return config


def read(tensors: MutableMapping[str, Tensor], file: str) -> dict[str, StoredLayer]:
    """Takes every NF4 and FP4 layer out of ``tensors``; biases stay. Raises CheckpointError naming the layer."""
    found = {}
    for layer, codec in layers(tensors).items():
        get = {n: tensors.pop(f"{layer}.weight.{n}", None) for n in SIDES}
        weight, entry = tensors.pop(f"{layer}.weight", None), tensors.pop(f"{layer}{MARK}{codec}")
        with naming(file, REPAIR, layer):
            found[layer] = StoredLayer(_read_layer(codec, weight, state(entry), get), form=codec)
    return found


def _read_layer(codec: str, weight: Tensor | None, config: dict, parts: dict[str, Tensor | None]) -> WeightOnly:
    missing = [n for n, t in {"weight": weight, **parts}.items() if t is None and not n.startswith("nested")]
    if missing:
        raise ValueError(f"{codec} needs {missing[0]}, which is not there")
    n, k = config["shape"]
    if weight.dtype != torch.uint8 or weight.numel() * 2 != n * k:
        raise ValueError(f"weight holds {weight.numel()} bytes of {weight.dtype}, expected {n * k // 2} of uint8")
    absmax = parts["absmax"]
    if parts["nested_absmax"] is not None or absmax.dtype == torch.uint8:
        absmax = _unnested(absmax, parts, config)
    if not all_finite(absmax) or not all_finite(parts["quant_map"]):
        raise ValueError("its scales hold NaN or infinity")
    table = parts["quant_map"].float().flatten()
    return WeightOnly(codec, (n, k), weight.reshape(n, -1), absmax.float().flatten(), table, config["blocksize"])


def _unnested(codes: Tensor, parts: dict[str, Tensor | None], config: dict) -> Tensor:
    """absmax of a nested ("double quantized") layer, float32 as bitsandbytes makes it."""
    scale, table = parts["nested_absmax"], parts["nested_quant_map"]
    block = config.get("nested_blocksize", NESTED_BLOCK)
    if scale is None or table is None or codes.dtype != torch.uint8 or table.numel() != 256:
        raise ValueError("its absmax is nested and the parts of that are not there")
    if not isinstance(block, int) or block <= 0 or scale.numel() != -(-codes.numel() // block):
        raise ValueError(f"nested_absmax has {scale.numel()} values, which do not fit {codes.numel()} codes")
    codes = codes.flatten()
    steps = scale.float().flatten().repeat_interleave(block)[: codes.numel()]
    return table.float().flatten()[codes.long()] * steps + float(config.get("nested_offset", 0.0))
