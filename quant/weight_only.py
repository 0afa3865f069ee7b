"""Weights that keep their maker's 4-bit (or other) codes and are made dense again on every forward: GGUF, bitsandbytes.

    tensor   shape              meaning
    qdata    (N, bytes)         GGUF: blocks with their own scales, see gguf_blocks.py
             (N, K/2)           nf4, fp4: the high nibble is the even column
    absmax   (N * K / block,)   nf4, fp4: float32 scale of each run of ``block`` weights in row-major order
    table    (16,)              nf4, fp4: float32 value of each code

    y = x W^T + bias,   W = table[code] * absmax     or GGUF's own formula

Nothing is rounded again. Activations are not quantized, so any GPU runs these, at 16-bit speed and 4-bit size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import gguf_blocks
from .checks import require_shapes

BNB = ("nf4", "fp4")
CODECS = (*BNB, *gguf_blocks.BLOCKS)


@dataclass(frozen=True)
class WeightOnly:
    """A stored (N, K) weight; see the table above. Raises ValueError when sizes do not belong together."""

    codec: str
    shape: tuple[int, int]
    qdata: Tensor
    absmax: Tensor | None = None
    table: Tensor | None = None
    block: int = 0

    def __post_init__(self):
        n, k = self.shape
        if self.codec not in CODECS:
            raise ValueError(f"unknown codec {self.codec!r}; this version knows {', '.join(CODECS)}")
        if self.codec in BNB:
            if self.block <= 0 or k % 2 or k % self.block:
                raise ValueError(f"{self.codec}: K={k} is not a multiple of the block size {self.block}")
            want = {"qdata": (n, k // 2), "absmax": (n * k // self.block,), "table": (16,)}
        else:
            row = gguf_blocks.BLOCKS[self.codec]
            if k % row.weights:
                raise ValueError(f"{self.codec}: K={k} is not a multiple of {row.weights}")
            want = {"qdata": (n, k // row.weights * row.nbytes)}
        require_shapes(self, self.codec, **want)

    def to(self, dtype: torch.dtype) -> WeightOnly:
        """Itself: it has no tensors in the compute dtype."""
        return self


def dequantize(w: WeightOnly) -> Tensor:
    """The dense weight, (N, K) float32."""
    if w.codec not in BNB:
        return gguf_blocks.decode(w.codec, w.qdata)
    # Both codes of a byte at once: an index per byte, not per weight, is the memory that matters here.
    pairs = torch.stack((w.table.repeat_interleave(16), w.table.repeat(16)), -1)
    values = torch.nn.functional.embedding(w.qdata.int(), pairs).reshape(-1, w.block)
    return (values * w.absmax.unsqueeze(1)).reshape(w.shape)


def rows(w: WeightOnly, start: int, stop: int) -> WeightOnly:
    """Rows [start, stop): every row holds whole blocks."""
    per_row = w.shape[1] // w.block if w.block else 0
    absmax = None if w.absmax is None else w.absmax[start * per_row : stop * per_row].contiguous()
    return replace(w, shape=(stop - start, w.shape[1]), qdata=w.qdata[start:stop].contiguous(), absmax=absmax)


def stack(parts: tuple[WeightOnly, ...]) -> WeightOnly | None:
    """The parts' rows one under the other as one weight, or None when their codes differ in kind."""
    first = parts[0]
    kinds = {(p.codec, p.block, p.shape[1]) for p in parts}
    if len(kinds) > 1 or (first.table is not None and not all(torch.equal(p.table, first.table) for p in parts)):
        return None
    absmax = None if first.absmax is None else torch.cat([p.absmax for p in parts])
    shape = (sum(p.shape[0] for p in parts), first.shape[1])
    return replace(first, shape=shape, qdata=torch.cat([p.qdata for p in parts]), absmax=absmax)


def linear(x: Tensor, w: WeightOnly, bias: Tensor | None = None) -> Tensor:
    """x (..., K) -> (..., N) in x's dtype."""
    return torch.nn.functional.linear(x, dequantize(w).to(x.dtype), None if bias is None else bias.to(x.dtype))
