"""SVDQuant W4A4: 4-bit weights and activations, and a 16-bit low-rank branch (arXiv 2411.05007).

    tensor         shape      dtype          meaning
    qweight        (N, K/2)   int8           codes in [-8, 7], natural order (packing.py)
    wscales        (K/64, N)  bf16/fp16/f32  weight scales, either sign
    smooth_factor  (K,)       same           activations are divided by it
    proj_down      (K, R)     same           sees the raw x: not smoothed, not shifted
    proj_up        (N, R)     same
    bias           (N,)       any, optional  as stored, see below

    xs = (x + shift) / smooth_factor           shift = 0, or 0.171875 when act_unsigned
    q  = round(xs / a), a = max|xs| / 7        per row and group of 64; codes [-7, 7]
         (act_unsigned: a = max / 15, codes [0, 15]: one more bit where the input is a GELU's output, >= -0.17)
    y  = (q a) (codes wscales)^T + (x proj_down) proj_up^T + bias

act_unsigned and the bias: the shift adds shift * sum_k Wr to the 4-bit product, Wr = codes * wscales / smooth_factor.
The stored bias has it taken off (`stored_bias`); a dense fall-back without the shift must put it back (`dense_bias`).
Storage range is [-8, 7]; the activation quantizer emits [-7, 7]. Source: comfy-kitchen backends/eager/svdquant.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import scales
from .checks import require_shapes
from .packing import Packed, unpack_signed
from .schemes import GROUP

SHIFT = 0.171875  # 11/64, just over the minimum of GELU


@dataclass(frozen=True)
class SVDQuantWeight(Packed):
    """A quantized (N, K) weight; see the table above. Raises ValueError when shapes do not belong together."""

    SIDES = ("wscales", "smooth_factor", "proj_down", "proj_up")
    qweight: Tensor
    wscales: Tensor
    smooth_factor: Tensor
    proj_down: Tensor
    proj_up: Tensor
    act_unsigned: bool = False

    def __post_init__(self):
        n, k = self.shape
        if k % GROUP:
            raise ValueError(f"svdquant_w4a4: K={k} is not a multiple of {GROUP}")
        branch = dict(proj_down=(k, self.rank), proj_up=(n, self.rank))
        require_shapes(self, "svdquant_w4a4", wscales=(k // GROUP, n), smooth_factor=(k,), **branch)


def blank(n: int, k: int, rank: int, dtype: torch.dtype, act_unsigned: bool = False) -> SVDQuantWeight:
    """What quantizing an (N, K) weight gives, without values: on torch's meta device."""
    shapes = ((k // GROUP, n), (k,), (k, rank), (n, rank))
    sides = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    return SVDQuantWeight(torch.empty(n, k // 2, dtype=torch.int8, device="meta"), *sides, act_unsigned)


def residual(w: SVDQuantWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The 4-bit part in the raw-x domain: codes * wscales / smooth_factor, (N, K) computed in ``dtype``."""
    return scales.applied(unpack_signed(w.qweight), w.wscales, dtype).div_(w.smooth_factor.to(dtype))


def dequantize(w: SVDQuantWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The effective dense weight, (N, K): 4-bit part plus low-rank branch. See also `dense_bias`."""
    return residual(w, dtype).addmm_(w.proj_up.to(dtype), w.proj_down.to(dtype).t())


def stored_bias(w: SVDQuantWeight, bias: Tensor | None) -> Tensor | None:
    """The bias to store with ``w``, from the float layer's bias: (N,) float32 beside ``w``, or None where nothing is
    needed.
    """
    if not w.act_unsigned:
        return bias
    correction = SHIFT * residual(w).sum(1)
    return -correction if bias is None else bias.to(correction) - correction


def dense_bias(w: SVDQuantWeight, bias: Tensor | None) -> Tensor | None:
    """The bias a dense fall-back needs, from the stored one: the inverse of `stored_bias`."""
    if not w.act_unsigned or bias is None:
        return bias
    correction = SHIFT * residual(w).sum(1)
    return bias.to(correction) + correction


def quantize_activation(x: Tensor, w: SVDQuantWeight) -> Tensor:
    """What the 4-bit product sees of ``x`` (..., K): quantized and dequantized, still smoothed and shifted."""
    xs = (x.float() + (SHIFT if w.act_unsigned else 0.0)) / w.smooth_factor.float()
    return scales.rounded(xs, 15 if w.act_unsigned else 7)


def linear(x: Tensor, w: SVDQuantWeight, bias: Tensor | None = None) -> Tensor:
    """Reference forward in float32: x (..., K) -> (..., N). This is the specification; kernels are held against it."""
    y = quantize_activation(x, w) @ scales.applied(unpack_signed(w.qweight), w.wscales).t()
    y = y + (x.float() @ w.proj_down.float()) @ w.proj_up.float().t()
    return y if bias is None else y + bias.float()
