"""Other quantizers' idea of one layer, as functions of (inputs, weight): each through its own library.

All but the kitchen formats are weight-only: their activations stay 16-bit, ours are 4-bit.
"""

# ruff: noqa: TID251
from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from comfyui_nibble.quant import core_formats
from torch import Tensor

Peer = Callable[[Tensor, Tensor], float]  # inputs (T, K), weight (N, K) -> relative output error


def relative(x: Tensor, w: Tensor, got: Tensor) -> float:
    """||x w^T - x got^T||^2 / ||y - mean y||^2."""
    y = x @ w.t()
    return float((x @ got.t() - y).square().sum() / (y - y.mean(0)).square().sum())


def bitsandbytes(kind: str) -> Peer:
    import bitsandbytes.functional as F

    def error(x: Tensor, w: Tensor) -> float:
        codes, state = F.quantize_4bit(w, blocksize=64, quant_type=kind)
        return relative(x, w, F.dequantize_4bit(codes, state).reshape(w.shape).to(w.dtype))

    return error


def gguf(kind: str) -> Peer:
    import gguf
    import numpy as np

    def error(x: Tensor, w: Tensor) -> float:
        row = gguf.GGMLQuantizationType[kind]
        back = gguf.quants.dequantize(gguf.quants.quantize(w.numpy().astype(np.float32), row), row)
        return relative(x, w, torch.from_numpy(back.copy()))

    return error


def quanto() -> Peer:
    from optimum.quanto import MaxOptimizer, qint4, quantize_weight

    def error(x: Tensor, w: Tensor) -> float:
        scale, shift = MaxOptimizer()(w, qtype=qint4, axis=0, group_size=64)
        return relative(x, w, quantize_weight(w, qint4, 0, scale, shift, group_size=64).dequantize())

    return error


def torchao() -> Peer:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    def error(x: Tensor, w: Tensor) -> float:
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
        quantize_(layer, IntxWeightOnlyConfig(torch.int4, PerGroup(64)))
        return relative(x, w, layer.weight.dequantize())

    return error


def kitchen(id: str) -> Peer:
    def error(x: Tensor, w: Tensor) -> float:
        return core_formats.output_error(x, w, core_formats.quantize(w, id, torch.bfloat16))

    return error


PEERS: dict[str, Callable[[], Peer]] = {
    "comfy-kitchen int8 W8A8": lambda: kitchen("int8_tensorwise"),
    "comfy-kitchen asym_w4a8_int8": lambda: kitchen("asym_w4a8_int8"),
    "comfy-kitchen nvfp4 W4A4": lambda: kitchen("nvfp4"),
    "comfy-kitchen convrot_w4a4": lambda: kitchen("convrot_w4a4"),
    "GGUF Q4_0 W4A16": lambda: gguf("Q4_0"),
    "bitsandbytes NF4 W4A16": lambda: bitsandbytes("nf4"),
    "bitsandbytes FP4 W4A16": lambda: bitsandbytes("fp4"),
    "optimum-quanto qint4 W4A16": quanto,
    "torchao int4 W4A16": torchao,
}


def installed() -> tuple[dict[str, Peer], dict[str, str]]:
    """(the peers that import here, why the others do not)."""
    found, missing = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in PEERS.items():
            try:
                found[name] = make()
            except ImportError as e:
                missing[name] = str(e).splitlines()[0]
    return found, missing
