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
from math import prod

import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.base import get_layout_class
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
    ``config``: K -> what the file's JSON says besides the format; ``stored``: (N, K) -> (dtype, shape) of the codes
    ("") and of each parameter that is a tensor.
    """

    id: str
    layout: str
    bits: int
    act_bits: int
    options: Callable[[int], dict | None]
    config: Callable[[int], dict]
    stored: Callable[[int, int], dict[str, tuple[torch.dtype, tuple[int, ...]]]]
    summary: str

    def fits(self, n: int, k: int) -> bool:
        return self.options(k) is not None and n % 8 == 0


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _rotated(**fixed) -> Callable[[int], dict | None]:
    return lambda k: {**fixed, "convrot_groupsize": rotation(k)} if rotation(k) else None


F32, E4M3, I8, U8 = torch.float32, torch.float8_e4m3fn, torch.int8, torch.uint8
FORMATS: dict[str, CoreFormat] = {
    f.id: f
    for f in (
        CoreFormat(
            "nvfp4", "TensorCoreNVFP4Layout", 4, 4,
            lambda k: {} if k % 16 == 0 else None,
            lambda k: {},
            lambda n, k: {"": (U8, (_up(n, 16), k // 2)), "scale": (F32, ()),
                          "block_scale": (E4M3, (_up(n, 128), _up(k // 16, 4)))},
            "4-bit floats, native on Blackwell",
        ),
        CoreFormat(
            "convrot_w4a4", "TensorCoreConvRotW4A4Layout", 4, 4,
            lambda k: _rotated()(k) if k % 64 == 0 else None,
            lambda k: {"convrot_groupsize": rotation(k)},
            lambda n, k: {"": (I8, (n, k // 2)), "scale": (F32, (n,))},
            "rotated int4, no calibration",
        ),
        CoreFormat(
            "asym_w4a8_int8", "AsymW4A8Int8Layout", 4, 8,
            _rotated(group_size=16),
            lambda k: {"group_size": 16, "convrot_groupsize": rotation(k)},
            lambda n, k: {"": (I8, (n, k // 2)), "scale": (E4M3, (n, k // 16)), "s_channel": (F32, (n,)),
                          "codebook": (F32, (16,))},
            "4-bit weights, 8-bit activations",
        ),
        CoreFormat(
            "int8_tensorwise", "TensorWiseINT8Layout", 8, 8,
            _rotated(per_channel=True, convrot=True),
            lambda k: {"convrot": True, "convrot_groupsize": rotation(k)},
            lambda n, k: {"": (I8, (n, k)), "scale": (F32, (n, 1))},
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


def blank(id: str, n: int, k: int, dtype: torch.dtype) -> QuantizedTensor:
    """What `quantize` gives for an (N, K) weight, without values: on torch's meta device."""
    row = FORMATS[id]
    parts = {name: torch.empty(shape, dtype=dt, device="meta") for name, (dt, shape) in row.stored(n, k).items()}
    codes = parts.pop("")
    params = get_layout_class(row.layout).Params(**parts, **row.config(k), orig_dtype=dtype, orig_shape=(n, k))
    return QuantizedTensor(codes, row.layout, params)


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
    return sum(prod(shape) * dtype.itemsize for dtype, shape in FORMATS[id].stored(n, k).values())
