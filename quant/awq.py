"""AWQ W4A16: 4-bit weights with a zero point, 16-bit activations. For modulations and text projections (M is small).

    tensor    shape      dtype          meaning
    qweight   (N, K/2)   int8           codes in [0, 15], natural order (packing.py)
    wscales   (K/64, N)  bf16/fp16/f32
    wzeros    (K/64, N)  same           value of code 8 (added, already scaled)
    proj_down (K, R)     same, optional low-rank branch of this pack: a LoRA, or the residual's best rank-R part
    proj_up   (N, R)     same, optional

    W = (codes - 8) wscales + wzeros [+ proj_up proj_down^T],   y = x W^T + bias

Source: comfy-kitchen backends/eager/awq.py; the branch is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import require_finite, require_range, require_shapes
from .packing import Packed, pack, unpack_unsigned
from .schemes import GROUP

ROUNDS = 4  # of rounding and refitting; the error has settled by then


@dataclass(frozen=True)
class AWQWeight(Packed):
    """A quantized (N, K) weight; see the table above. Raises ValueError when shapes do not belong together."""

    SIDES = ("wscales", "wzeros", "proj_down", "proj_up")
    qweight: Tensor
    wscales: Tensor
    wzeros: Tensor
    proj_down: Tensor | None = None
    proj_up: Tensor | None = None

    def __post_init__(self):
        n, k = self.shape
        if k % GROUP:
            raise ValueError(f"awq_w4a16: K={k} is not a multiple of {GROUP}")
        expected = dict(wscales=(k // GROUP, n), wzeros=(k // GROUP, n))
        if self.proj_down is not None:
            expected |= dict(proj_down=(k, self.rank), proj_up=(n, self.rank))
        require_shapes(self, "awq_w4a16", **expected)


def blank(n: int, k: int, dtype: torch.dtype) -> AWQWeight:
    """What quantizing an (N, K) weight gives, without values: on torch's meta device."""
    sides = (torch.empty(k // GROUP, n, dtype=dtype, device="meta") for _ in range(2))
    return AWQWeight(torch.empty(n, k // 2, dtype=torch.int8, device="meta"), *sides)


def quantize(weight: Tensor, dtype: torch.dtype = torch.bfloat16, importance: Tensor | None = None) -> AWQWeight:
    """Least-squares 4-bit groups of ``weight`` (N, K): min-max start, then rounding and refitting in turn.

    ``importance`` (K,) >= 0 weighs each column's error, for instance E[x^2] of the input (None: all alike). Scales and
    zeros are rounded to ``dtype`` before codes are chosen. Raises ValueError if K % 64, and for a weight that is not
    finite or leaves the range of ``dtype``.
    """
    n, k = weight.shape
    if k % GROUP:
        raise ValueError(f"K={k} is not a multiple of {GROUP}")
    require_finite(weight)
    w = weight.float().reshape(n, k // GROUP, GROUP)
    h = torch.ones(k, device=w.device) if importance is None else importance.float().to(w.device)
    h = (h / h.mean().clamp(min=1e-30) + 1e-6).reshape(1, k // GROUP, GROUP)
    total = h.sum(-1, keepdim=True)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero = low + 8 * scale
    best = torch.full_like(low, torch.inf)
    kept = None
    for _ in range(ROUNDS):
        scale, zero = scale.to(dtype).float(), zero.to(dtype).float()
        q = ((w - zero) / torch.where(scale == 0, 1.0, scale)).round().clamp(-8, 7)
        error = (q * scale + zero - w).square_().mul_(h).sum(-1, keepdim=True)
        if kept is None:
            kept = (q, scale, zero)
        better = error < best
        kept = tuple(torch.where(better, new, old) for new, old in zip((q, scale, zero), kept, strict=True))
        best = torch.where(better, error, best)
        # The best scale and zero for these codes: a straight line through (code, weight).
        mq, mw = (q * h).sum(-1, keepdim=True) / total, (w * h).sum(-1, keepdim=True) / total
        spread = (h * (q - mq).square()).sum(-1, keepdim=True)
        slope = (h * (q - mq) * (w - mw)).sum(-1, keepdim=True) / torch.where(spread == 0, 1.0, spread)
        scale = torch.where(spread == 0, scale, slope)
        zero = mw - scale * mq
    q, scale, zero = kept
    sides = [t.squeeze(-1).t().contiguous().to(dtype) for t in (scale, zero)]
    require_range(sides, weight, dtype)
    return AWQWeight(pack((q + 8).reshape(n, k)), *sides)


def dequantize(w: AWQWeight) -> Tensor:
    """The effective dense weight, (N, K) float32, with the low-rank branch if there is one."""
    n, k = w.shape
    codes = unpack_unsigned(w.qweight).float().reshape(n, k // GROUP, GROUP) - 8
    scales, zeros = (t.float().t().unsqueeze(-1) for t in (w.wscales, w.wzeros))
    dense = (codes * scales + zeros).reshape(n, k)
    return dense if w.proj_down is None else dense + w.proj_up.float() @ w.proj_down.float().t()


def linear(x: Tensor, w: AWQWeight, bias: Tensor | None = None) -> Tensor:
    """Reference forward in float32: x (..., K) -> (..., N)."""
    y = x.float() @ dequantize(w).t()
    return y if bias is None else y + bias.float()
