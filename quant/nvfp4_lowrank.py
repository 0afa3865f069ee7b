"""SVDQuant with NVFP4 codes: 4-bit floats, an e4m3 scale per 16, and a 16-bit low-rank branch. Native on Blackwell.

    tensor         shape      dtype     meaning
    qweight        (N, K/2)   uint8     E2M1 codes, the high nibble is the even column (kitchen's NVFP4 order)
    block_scale    (N, K/16)  e4m3      natural order, not cuBLAS-blocked
    channel_scale  (N,)       float32   what is left of the scale: per tensor times per output channel
    smooth_factor  (K,)       bf16/...  activations are divided by it
    proj_down      (K, R)     same      sees the raw x: not smoothed
    proj_up        (N, R)     same

    q = e2m1(x / smooth_factor / a), a = e4m3(max|.| / 6) per row and group of 16, no global activation scale
    y = (q a) (codes block_scale)^T channel_scale + (x proj_down) proj_up^T + bias

The channel scale never touches the branch or the bias. Source: the nunchaku engine's W4A4 kernels (fp4 path).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from comfy_kitchen.float_utils import from_blocked, to_blocked
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.nvfp4 import TensorCoreNVFP4Layout
from torch import Tensor

from .checks import require_shapes
from .packing import Packed

GROUP = 16
LAYOUT = "TensorCoreNVFP4Layout"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NVFP4LowRankWeight(Packed):
    """A quantized (N, K) weight; see the table above. Raises ValueError when shapes do not belong together."""

    SIDES = ("smooth_factor", "proj_down", "proj_up")
    qweight: Tensor
    block_scale: Tensor
    channel_scale: Tensor
    smooth_factor: Tensor
    proj_down: Tensor
    proj_up: Tensor

    def __post_init__(self):
        n, k = self.shape
        if k % GROUP or n % 16:
            raise ValueError(f"svdquant_nvfp4: N={n} and K={k} must be multiples of 16")
        expected = dict(block_scale=(n, k // GROUP), channel_scale=(n,), smooth_factor=(k,))
        require_shapes(self, "svdquant_nvfp4", **expected, proj_down=(k, self.rank), proj_up=(n, self.rank))


def codes(w: NVFP4LowRankWeight) -> Tensor:
    """(N, K) uint8 E2M1 codes, 0..15 with the sign in bit 3."""
    return torch.stack((w.qweight >> 4, w.qweight & 0x0F), -1).flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """(..., K) E2M1 codes -> (..., K/2) uint8, the even column in the high nibble."""
    codes = codes.to(torch.uint8)
    return (codes[..., 0::2] << 4) | codes[..., 1::2]


def quantized_part(w: NVFP4LowRankWeight) -> Tensor:
    """What the smoothed activation meets: codes * scales, (N, K) float32."""
    n, k = w.shape
    table = torch.tensor((*E2M1, *(-v for v in E2M1)), device=w.qweight.device)
    values = table[codes(w).long()].reshape(n, k // GROUP, GROUP)
    return (values * w.block_scale.float().unsqueeze(-1)).reshape(n, k) * w.channel_scale.float().unsqueeze(1)


def dequantize(w: NVFP4LowRankWeight) -> Tensor:
    """The effective dense weight in the raw-x domain, (N, K) float32, branch included."""
    return quantized_part(w) / w.smooth_factor.float() + w.proj_up.float() @ w.proj_down.float().t()


def rows(w: NVFP4LowRankWeight, start: int, stop: int) -> NVFP4LowRankWeight:
    """Rows [start, stop); smooth_factor and proj_down are shared with the whole."""
    cut = {f: getattr(w, f)[start:stop].contiguous() for f in ("qweight", "block_scale", "channel_scale", "proj_up")}
    return replace(w, **cut)


def blocked(scale: Tensor) -> Tensor:
    """(N, K/16) e4m3 in cuBLAS's blocked order, (roundup(N, 128), roundup(K/16, 4))."""
    return to_blocked(scale.view(torch.uint8), flatten=False).view(torch.float8_e4m3fn)


def unblocked(scale: Tensor, n: int, groups: int) -> Tensor:
    """The inverse of `blocked`. Raises ValueError for a shape that is not its."""
    want = (-(-n // 128) * 128, -(-groups // 4) * 4)
    if tuple(scale.shape) != want:
        raise ValueError(f"block scale has shape {tuple(scale.shape)}, expected {want} for N={n}, K={groups * GROUP}")
    return from_blocked(scale.view(torch.uint8), n, groups).contiguous().view(torch.float8_e4m3fn)


@lru_cache(maxsize=1)
def _say_emulated() -> None:
    log.warning(
        "This GPU has no FP4 tensor cores: an nvfp4 model is emulated on it, in 16-bit speed. "
        "An int4 file of the same model runs natively on it; NVIDIA Blackwell runs this one natively"
    )


def linear(x: Tensor, w: NVFP4LowRankWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) -> (..., N) in x's dtype: kitchen's FP4 kernel where there is one, else the same numbers dequantized.

    The tensor scale is the largest channel scale, so that 16-bit outputs stay in range before the rest is applied.
    """
    flat = x.reshape(-1, x.shape[-1])
    top = w.channel_scale.max().clamp(min=1e-30)
    smoothed = (flat / w.smooth_factor.to(x.dtype)).contiguous()
    q = QuantizedTensor.from_float(smoothed, LAYOUT, scale=torch.ones((), device=x.device))
    scale = blocked(w.block_scale)
    params = TensorCoreNVFP4Layout.Params(scale=top, orig_dtype=x.dtype, orig_shape=w.shape, block_scale=scale)
    weight = QuantizedTensor(w.qweight, LAYOUT, params)
    if x.is_cuda and TensorCoreNVFP4Layout.supports_fast_matmul():
        y = torch.nn.functional.linear(q, weight)
    else:
        _say_emulated()
        y = torch.nn.functional.linear(q.dequantize(), weight.dequantize())
    y = y * (w.channel_scale / top).to(x.dtype) + (flat @ w.proj_down.to(x.dtype)) @ w.proj_up.to(x.dtype).t()
    y = y if bias is None else y + bias.to(x.dtype)
    return y.reshape(*x.shape[:-1], w.shape[0])
