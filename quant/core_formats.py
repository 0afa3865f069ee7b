"""The formats that ComfyUI runs with no pack at all, through comfy-kitchen's own quantizers: no data, no low rank.

    nvfp4             E2M1 codes, e4m3 scale per 16, one float32 scale; 4-bit activations. Native on Blackwell
    convrot_w4a4      int4 after a regular Hadamard rotation of K, one scale per row; 4-bit activations
    asym_w4a8_int8    4-bit codebook, e4m3 scale per 16, rotation; 8-bit activations. Native on int8 tensor cores
    int8_tensorwise   int8 after a rotation, one scale per row; 8-bit activations: for layers that 4 bits hurt

Each becomes a QuantizedTensor that ComfyUI's and diffusers' linears run. Source: comfy-kitchen tensor/*.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from .checks import narrowed, relative_error, require_finite

NVFP4_SPAN = 448 * 6  # of an e4m3 scale times an E2M1 code
HADAMARD = (256, 64, 16)  # rotation sizes, powers of 4, the largest that divides K is used


def rotation(k: int) -> int:
    """The largest rotation that fits K, 0 if none does."""
    return next((g for g in HADAMARD if k % g == 0), 0)


@dataclass(frozen=True)
class CoreFormat:
    """``bits``: stored per weight without scales; ``options``: K -> the quantizer's arguments (None: does not fit);
    ``config``: K -> what the file's JSON says besides the format; ``nbytes``: (N, K) -> bytes as stored.
    """

    id: str
    layout: str
    bits: int
    act_bits: int
    options: Callable[[int], dict | None]
    config: Callable[[int], dict]
    nbytes: Callable[[int, int], int]
    summary: str

    def fits(self, n: int, k: int) -> bool:
        return self.options(k) is not None and n % 8 == 0


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _rotated(**fixed) -> Callable[[int], dict | None]:
    return lambda k: {**fixed, "convrot_groupsize": rotation(k)} if rotation(k) else None


FORMATS: dict[str, CoreFormat] = {
    f.id: f
    for f in (
        CoreFormat(
            "nvfp4", "TensorCoreNVFP4Layout", 4, 4,
            lambda k: {} if k % 16 == 0 else None,
            lambda k: {},
            lambda n, k: _up(n, 16) * k // 2 + _up(n, 128) * _up(k // 16, 4) + 4,
            "4-bit floats, native on Blackwell",
        ),
        CoreFormat(
            "convrot_w4a4", "TensorCoreConvRotW4A4Layout", 4, 4,
            lambda k: _rotated()(k) if k % 64 == 0 else None,
            lambda k: {"convrot_groupsize": rotation(k)},
            lambda n, k: n * k // 2 + 4 * n,
            "rotated int4, no calibration",
        ),
        CoreFormat(
            "asym_w4a8_int8", "AsymW4A8Int8Layout", 4, 8,
            _rotated(group_size=16),
            lambda k: {"group_size": 16, "convrot_groupsize": rotation(k)},
            lambda n, k: n * k // 2 + n * k // 16 + 4 * n + 64,
            "4-bit weights, 8-bit activations",
        ),
        CoreFormat(
            "int8_tensorwise", "TensorWiseINT8Layout", 8, 8,
            _rotated(per_channel=True, convrot=True),
            lambda k: {"convrot": True, "convrot_groupsize": rotation(k)},
            lambda n, k: n * k + 4 * n,
            "8-bit weights and activations",
        ),
    )
}  # fmt: skip


def quantize(weight: Tensor, id: str, dtype: torch.dtype) -> QuantizedTensor:
    """``weight`` (N, K) in the format ``id``, logical dtype ``dtype``. Raises ValueError where it does not fit, and for
    a weight that is not finite or leaves the range of ``dtype``.
    """
    row, (n, k) = FORMATS[id], weight.shape
    if not row.fits(n, k):
        raise ValueError(f"{id} does not fit a layer of N={n}, K={k}")
    require_finite(weight)
    rounded = narrowed(weight, dtype).contiguous()
    scale = {"scale": nvfp4_scale(rounded)} if id == "nvfp4" else {}
    return QuantizedTensor.from_float(rounded, row.layout, **row.options(k), **scale)


def nvfp4_scale(x: Tensor) -> Tensor:
    """(): the scale of a whole tensor as kitchen chooses it; 1 where that would be 0, by which kitchen would divide.

    It chooses in ``x``'s dtype, where small numbers vanish: there it is chosen in float32.
    """
    top = x.abs().amax()
    scale, exact = (top / NVFP4_SPAN).float(), top.float() / NVFP4_SPAN
    scale = torch.where(scale == 0, exact, scale)
    return torch.where(scale == 0, 1.0, scale)


def output_error(x: Tensor, w: Tensor, weight: QuantizedTensor) -> float:
    """`checks.relative_error` over tokens ``x`` (T, K), through the format's own linear."""
    return relative_error(_linear(x.to(weight.dtype), weight).float(), x @ w.t())


def _linear(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """The layer as ComfyUI runs it. nvfp4 has its input quantized outside, and no kernel for it but Blackwell's: its
    numbers are those of both operands rounded and back.
    """
    if weight._layout_cls != FORMATS["nvfp4"].layout:
        return torch.nn.functional.linear(x, weight)
    seen = QuantizedTensor.from_float(x, weight._layout_cls, scale=nvfp4_scale(x))
    return torch.nn.functional.linear(seen.dequantize(), weight.dequantize())


def stored_bytes(id: str, n: int, k: int) -> int:
    """Bytes of an (N, K) weight in the format ``id``, scales and tables included."""
    return FORMATS[id].nbytes(n, k)
