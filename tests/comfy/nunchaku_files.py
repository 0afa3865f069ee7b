"""A FLUX.1 file as nunchaku publishes them, and one as bitsandbytes does, from a float file in native names."""

import json
from functools import partial
from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfyui_nibble.checkpoints.formats import nunchaku
from comfyui_nibble.families import flux
from comfyui_nibble.quant import nvfp4_lowrank
from comfyui_nibble.quant.modules import quantize_weight
from comfyui_nibble.quant.nvfp4_lowrank import NVFP4LowRankWeight
from comfyui_nibble.quant.policy import LayerPlan
from safetensors.torch import load_file, save_file

RANK = 16
NVFP4 = "TensorCoreNVFP4Layout"
BF16 = torch.bfloat16


def _fp4(name: str, weight, bias) -> dict[str, torch.Tensor]:
    """nvfp4 with a branch: the best rank, then kitchen's own rounding of the rest. No smoothing."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    up, down = (u * s)[:, :RANK].to(BF16), v[:RANK].t().to(BF16)
    q = QuantizedTensor.from_float((weight - up.float() @ down.float().t()).to(BF16), NVFP4)
    (n, k), p = weight.shape, q._params
    scale = nvfp4_lowrank.unblocked(p.block_scale.view(torch.float8_e4m3fn), n, k // 16)
    channel = p.scale.float().reshape(1).expand(n).contiguous()
    done = NVFP4LowRankWeight(q._qdata.view(torch.uint8), scale, channel, torch.ones(k, dtype=BF16), down, up)
    out = nunchaku.write(name, done)
    return out | {f"{name}.wtscale": p.scale.float().reshape(1), f"{name}.bias": nunchaku.write_bias(bias.to(BF16))}


def _svdq_layer(name: str, weight, bias, unsigned: bool = False, fp4: bool = False) -> dict[str, torch.Tensor]:
    if fp4:
        return _fp4(name, weight, bias)
    done = quantize_weight(weight, bias, LayerPlan("svdquant_w4a4", "", RANK, unsigned), BF16)
    out = nunchaku.write(name, done.weight)
    return out if done.bias is None else out | {f"{name}.bias": nunchaku.write_bias(done.bias.to(BF16))}


def _modulation(name: str, weight, bias, vectors: int, plus_one: list[int]) -> dict[str, torch.Tensor]:
    """Vectors woven into each other, 1 added to the scales: what the exporter does to them."""
    n = weight.shape[0]
    bias = bias.clone()
    bias.reshape(vectors, -1)[plus_one] += 1
    woven = torch.arange(n).reshape(vectors, n // vectors).t().reshape(-1)
    done = quantize_weight(weight[woven], None, LayerPlan("awq_w4a16", ""), BF16)
    return nunchaku.write(name, done.weight) | {f"{name}.bias": bias[woven].to(BF16)}


def flux_as_nunchaku(source: Path, target: Path, fp4: bool = False) -> Path:
    t = load_file(source)
    _svdq = partial(_svdq_layer, fp4=fp4)
    pair = lambda n: (t.pop(f"{n}.weight"), t.pop(f"{n}.bias"))  # noqa: E731
    out = {}
    for native, end in (("img", ""), ("txt", "_context")):
        a, b = f"double_blocks.0.{native}_", "transformer_blocks.0."
        out |= _svdq(f"{b}qkv_proj{end}", *pair(f"{a}attn.qkv"))
        out |= _svdq(f"{b}out_proj{end}", *pair(f"{a}attn.proj"))
        out |= _svdq(f"{b}mlp{end}_fc1", *pair(f"{a}mlp.0"))
        out |= _svdq(f"{b}mlp{end}_fc2", *pair(f"{a}mlp.2"), unsigned=True)
        out |= _modulation(f"{b}norm1{end}.linear", *pair(f"{a}mod.lin"), 6, [1, 4])
        added = "added_" if end else ""
        for q, n in (("q", "query"), ("k", "key")):
            out[f"{b}norm_{added}{q}.weight"] = t.pop(f"{a}attn.norm.{n}_norm.weight").to(BF16)
    a, b = "single_blocks.0.", "single_transformer_blocks.0."
    (w, bias), (w2, bias2) = pair(f"{a}linear1"), pair(f"{a}linear2")
    d = w.shape[1]
    out |= _svdq(f"{b}qkv_proj", w[: 3 * d], bias[: 3 * d]) | _svdq(f"{b}mlp_fc1", w[3 * d :], bias[3 * d :])
    out |= _svdq(f"{b}out_proj", w2[:, :d].contiguous(), bias2)
    out |= _svdq(f"{b}mlp_fc2", w2[:, d:].contiguous(), torch.zeros_like(bias2), unsigned=True)
    out |= _modulation(f"{b}norm.linear", *pair(f"{a}modulation.lin"), 3, [1])
    for q, n in (("q", "query"), ("k", "key")):
        out[f"{b}norm_{q}.weight"] = t.pop(f"{a}norm.{n}_norm.weight").to(BF16)
    for native, name in flux.TOP.items():
        for end in ("weight", "bias"):
            value = t.pop(f"{native}.{end}").to(BF16)
            swap = native == "final_layer.adaLN_modulation.1"
            out[f"{name}.{end}"] = torch.cat(value.chunk(2)[::-1]) if swap else value
    assert not t, t.keys()
    info = {"model_class": "NunchakuFluxTransformer2dModel", "quantization_config": json.dumps({"method": "svdquant"})}
    save_file({n: v.clone() for n, v in out.items()}, target, info)
    return target


NF4 = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)  # fmt: skip


def as_nf4(source: Path, target: Path, block: int = 64) -> Path:
    """Every linear of the blocks in NF4, as bitsandbytes stores it; the rest in 16 bits."""
    out, table = {}, torch.tensor(NF4)
    for name, value in load_file(source).items():
        if not name.endswith(".weight") or value.dim() != 2 or "blocks." not in name:
            out[name] = value.to(BF16)
            continue
        flat = value.reshape(-1, block)
        absmax = flat.abs().amax(1)
        codes = (flat / absmax.unsqueeze(1)).unsqueeze(-1).sub(table).abs().argmin(-1).reshape(-1, 2).to(torch.uint8)
        state = {"quant_type": "nf4", "blocksize": block, "shape": list(value.shape), "dtype": "bfloat16"}
        out |= {
            name: ((codes[:, 0] << 4) | codes[:, 1]).unsqueeze(1),
            f"{name}.absmax": absmax,
            f"{name}.quant_map": table,
        }
        entry = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        out[f"{name}.quant_state.bitsandbytes__nf4"] = entry
    save_file({n: v.clone() for n, v in out.items()}, target)
    return target
