"""A float model's linears in every layout that a file can have, with its marks wherever a file can have them.

``write(source, target, layout, marks, prefix)``: every linear of ``source`` whose name says that it is inside a block
becomes ``layout``; the rest stays as it is. The tensors are made by comfy-kitchen's quantizers, or by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfyui_nibble.checkpoints.formats import comfy_quant, core_quant
from comfyui_nibble.quant import core_formats, nvfp4_lowrank
from comfyui_nibble.quant.modules import quantize_weight
from comfyui_nibble.quant.nvfp4_lowrank import NVFP4LowRankWeight
from comfyui_nibble.quant.parts import COLUMNS, Parts
from comfyui_nibble.quant.policy import LayerPlan
from comfyui_nibble.quant.weight_only import WeightOnly
from safetensors.torch import load_file, save_file

BF16, RANK = torch.bfloat16, 8
NF4 = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)  # fmt: skip
Layer = dict[str, torch.Tensor]  # last name -> tensor; the JSON is under "comfy_quant"


def _json(config: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def _core(w, id: str) -> Layer:
    return {n.removeprefix("x."): t for n, t in core_quant.write("x", core_formats.quantize(w, id, BF16)).items()}


def _fp8(w, dtype=torch.float8_e4m3fn) -> Layer:
    scale = w.abs().max() / torch.finfo(dtype).max
    id = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}[dtype]
    return {"weight": (w / scale).to(dtype), "weight_scale": scale.float(), "comfy_quant": _json({"format": id})}


def _mxfp8(w) -> Layer:
    q = QuantizedTensor.from_float(w.to(BF16), "TensorCoreMXFP8Layout")
    scale = q._params.scale.view(torch.uint8)
    return {"weight": q._qdata, "weight_scale": scale, "comfy_quant": _json({"format": "mxfp8"})}


def _int8_tensor(w) -> Layer:
    scale = w.abs().max() / 127
    codes = (w / scale).round().clamp(-127, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale.float(), "comfy_quant": _json({"format": "int8_tensorwise"})}


def _smoothed_nvfp4(w) -> Layer:
    """ModelOpt's: the layer multiplies its input by pre_quant_scale first, and the weight is divided by it."""
    g = torch.Generator().manual_seed(1)
    scale = 0.5 + torch.rand(w.shape[1], generator=g)
    return _core(w / scale, "nvfp4") | {"pre_quant_scale": scale.to(BF16)}


def _split(w, rank: int = RANK):
    """(up (N, r), down (K, r)) bf16, what is left in float32."""
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    up, down = (u * s)[:, :rank].to(BF16), v[:rank].t().contiguous().to(BF16)
    return up, down, w - up.float() @ down.float().t()


def _krea(w) -> Layer:
    """convrot_w4a4 with the branch of Krea-2-SVDQuant: l1 (N, R), l2 (R, K)."""
    up, down, rest = _split(w)
    return _core(rest, "convrot_w4a4") | {"svdq_l1": up, "svdq_l2": down.t().contiguous()}


def _low_rank(w, id: str) -> Layer:
    up, down, rest = _split(w)
    layer = _core(rest, id)
    base = json.loads(bytes(layer["comfy_quant"].tolist()))
    return layer | {"proj_down": down, "proj_up": up, "comfy_quant": _json({"format": "nibble_low_rank", "base": base})}


def _ours(w, scheme: str, tiled: bool = False) -> Layer:
    weight = quantize_weight(w, None, LayerPlan(scheme, "", RANK if scheme == "svdquant_w4a4" else 0), BF16).weight
    tiled = tiled and w.shape[0] % 128 == 0
    return {n.removeprefix("x."): t for n, t in comfy_quant.write("x", weight, tiled).items()}


def _awq_128(w) -> Layer:
    """Groups of 128 and ComfyUI's own name for the zeros."""
    layer = _ours(w, "awq_w4a16")
    n, k = w.shape
    groups = w.reshape(n, k // 128, 128)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).to(BF16)
    zero = (low + 8 * scale.float()).to(BF16)
    codes = ((groups - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)).round().clamp(-8, 7) + 8
    codes = codes.reshape(n, k).to(torch.uint8)
    weight = (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.int8)
    del layer["weight_zero"]
    entry = _json({"format": "awq_w4a16", "group_size": 128})
    sides = {"weight_scale": scale.t().contiguous(), "weight_zeros": zero.t().contiguous()}
    return layer | sides | {"weight": weight, "comfy_quant": entry}


def nvfp4_branch(w) -> NVFP4LowRankWeight:
    up, down, rest = _split(w)
    q = QuantizedTensor.from_float(rest.to(BF16), "TensorCoreNVFP4Layout")
    (n, k), p = w.shape, q._params
    scale = nvfp4_lowrank.unblocked(p.block_scale.view(torch.float8_e4m3fn), n, k // 16)
    channel = p.scale.float().reshape(1).expand(n).contiguous()
    return NVFP4LowRankWeight(q._qdata.view(torch.uint8), scale, channel, torch.ones(k, dtype=BF16), down, up)


def nf4(w, block: int = 64) -> WeightOnly:
    flat = w.reshape(-1, block)
    absmax = flat.abs().amax(1)
    codes = (flat / absmax.unsqueeze(1)).unsqueeze(-1).sub(torch.tensor(NF4)).abs().argmin(-1).reshape(-1, 2)
    codes = codes.to(torch.uint8)
    packed = ((codes[:, 0] << 4) | codes[:, 1]).reshape(w.shape[0], -1)
    return WeightOnly("nf4", tuple(w.shape), packed, absmax, torch.tensor(NF4), block)


def q8_0(w) -> WeightOnly:
    """GGUF's Q8_0: a float16 scale and 32 int8 codes a block."""
    n, k = w.shape
    blocks = w.reshape(n, k // 32, 32)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).to(torch.float16)
    codes = (blocks / scale.float().clamp(min=1e-12)).round().clamp(-127, 127).to(torch.int8)
    data = torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], -1)
    return WeightOnly("q8_0", (n, k), data.reshape(n, -1))


def _written(weight) -> Layer:
    return {n.removeprefix("x."): t for n, t in comfy_quant.write("x", weight).items()}


def _with_branch(make: Callable) -> Callable:
    """A weight of one kind with a branch, as a LoRA baked into it leaves it."""

    def layer(w) -> Layer:
        up, down, rest = _split(w)
        return _written(Parts((make(rest),), "rows", down, up))

    return layer


def _columns(w) -> Layer:
    """Two 4-bit parts side by side, as nunchaku's FLUX.1 has in linear2."""
    half = w.shape[1] // 128 * 64
    halves = [quantize_weight(p.contiguous(), None, LayerPlan("svdquant_w4a4", "", RANK), BF16).weight
              for p in (w[:, :half], w[:, half:])]  # fmt: skip
    return _written(Parts(tuple(halves), COLUMNS))


def _awq_branch(w) -> Layer:
    up, down, rest = _split(w)
    plain = quantize_weight(rest, None, LayerPlan("awq_w4a16", ""), BF16).weight
    return _written(type(plain)(plain.qweight, plain.wscales, plain.wzeros, down, up))


CORE: dict[str, Callable[[torch.Tensor], Layer]] = {
    "fp8": _fp8,
    "fp8 e5m2": lambda w: _fp8(w, torch.float8_e5m2),
    "mxfp8": _mxfp8,
    "nvfp4": lambda w: _core(w, "nvfp4"),
    "nvfp4 smoothed": _smoothed_nvfp4,
    "int8": _int8_tensor,
    "int8 rotated": lambda w: _core(w, "int8_tensorwise"),
    "convrot": lambda w: _core(w, "convrot_w4a4"),
    "asym": lambda w: _core(w, "asym_w4a8_int8"),
}
OURS: dict[str, Callable[[torch.Tensor], Layer]] = {
    "svdquant": lambda w: _ours(w, "svdquant_w4a4"),
    "svdquant tiled": lambda w: _ours(w, "svdquant_w4a4", tiled=True),
    "awq": lambda w: _ours(w, "awq_w4a16"),
    "awq 128": _awq_128,
    "awq branch": _awq_branch,
    "nvfp4 branch": lambda w: _written(nvfp4_branch(w)),
    "nf4": lambda w: _written(nf4(w)),
    "nf4 branch": _with_branch(nf4),
    "q8_0": lambda w: _written(q8_0(w)),
    "two parts": _columns,
    "krea": _krea,
    "int8 branch": lambda w: _low_rank(w, "int8_tensorwise"),
    "asym branch": lambda w: _low_rank(w, "asym_w4a8_int8"),
    "nvfp4 core branch": lambda w: _low_rank(w, "nvfp4"),
}
LAYOUTS = {**CORE, **OURS}
# Several layouts in turn, as files that a byte budget or a policy has made have them
MIXED = {
    "mixed": ("fp8", "int8 rotated", "nvfp4", "convrot", "asym", "mxfp8"),
    "promoted": ("svdquant", "int8 rotated", "awq", "svdquant"),
}
MARKS = ("layers", "metadata", "both", "old")  # old: scaled_fp8, of fp8 files only


def is_block_linear(name: str, value: torch.Tensor) -> bool:
    inside = name.startswith(("double_blocks.", "single_blocks.")) or "transformer_blocks." in name
    return inside and name.endswith(".weight") and value.dim() == 2 and value.shape[1] % 64 == 0


def write(source: Path, target: Path, layout: str, marks: str = "layers", prefix: str = "", more: dict | None = None):
    """``layout``: one of `LAYOUTS` or `MIXED`. ``more``: tensors besides the model's, for a whole checkpoint. Names in
    the metadata have no prefix, as quantizers of diffusion models write them. Returns ``target``.
    """
    out, entries, count = dict(more or {}), {}, 0
    for name, value in load_file(source).items():
        if not is_block_linear(name, value):
            out[prefix + name] = value.to(BF16) if value.dim() > 1 else value.clone()
            continue
        turns = MIXED.get(layout, (layout,))
        make = LAYOUTS[turns[count % len(turns)]]
        layer, bare = make(value.float()), name.removesuffix(".weight")
        count += 1
        entry = layer.pop("comfy_quant")
        if marks == "old":
            layer["scale_weight"] = layer.pop("weight_scale")
        elif marks in ("layers", "both"):
            layer["comfy_quant"] = entry
        if marks in ("metadata", "both"):
            entries[bare] = json.loads(bytes(entry.tolist()))
        out |= {f"{prefix}{bare}.{n}": t.contiguous() for n, t in layer.items()}
    if marks == "old":
        out[f"{prefix}scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    info = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": entries})} if entries else {}
    save_file({n: t.clone() for n, t in out.items()}, target, {"format": "pt", **info})
    return target
