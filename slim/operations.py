"""The operations: what each saves, and what stands in for the layer. The tables at the end hold one row each.

    low rank    3x3 as a 3x1 to r channels and a 1x3 from them: W[o, i, y, x] = sum_r B[o, r, x] A[r, i, y]. The best B
                and A are those of the singular value decomposition of W as a matrix (3 O x 3 I) of rows (o, x) and
                columns (i, y). Cost: 3 r (I + O) for 9 I O; the full rank, 3 min(I, O), costs twice the original.
                Source: Jaderberg et al., 1405.3866, scheme 2
    separable   3x3 as k 3x3 filters of each input channel and a 1x1: W[o, i, y, x] = sum_j P[o, i, j] D[i, j, y, x].
                Each input channel is a matrix (O x 9), and its k best filters are its singular vectors. k = 1 is the
                depthwise separable convolution of MobileNet; k = 9 is exact. Cost: k I (9 + O) for 9 I O. A filter of
                each channel reads and writes as much as any layer, so cards save less time than FLOPs
    pool        self-attention whose keys and values are averaged over neighbours: every query still looks at the whole
                picture, coarsely. The average is of the layer's input, so what is gone is never projected
    skip        no self-attention: the layer adds nothing. MobileDiffusion's UNet has none at its highest resolutions
    relu        relu(Q K^T / sqrt d) V / n, n the number of keys. The same two products: what goes is the softmax, which
                phones are slow at. It draws badly until it is trained on (MobileDiffusion: 10,000 steps)

``strength`` is in [0, 1): the share of a layer's FLOPs that a person wants to save; 0 leaves the layer alone. FLOPs
are two for each multiplication with its addition, as `torch.utils.flop_counter` counts; norms, softmax and additions
count nothing there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..quant.calib.low_rank import balanced, truncated

Pair = tuple[int, int]
CHUNK = 1024  # queries at once: relu's scores are stored, (B, heads, CHUNK, keys)
# share of the keys that go -> the area that becomes one
KERNELS = ((1 / 2, (1, 2)), (3 / 4, (2, 2)), (15 / 16, (4, 4)))


@dataclass(frozen=True)
class Stage:
    """One of the convolutions, applied one after the other, that stand in for one: ``weight`` (O, I/groups, kh, kw).
    The bias of the whole stands at the last.
    """

    weight: Tensor
    stride: Pair
    padding: Pair
    groups: int = 1


@dataclass(frozen=True)
class Conv:
    """A 3x3 convolution with a padding of 1. ``size``: (height, width) of what goes in."""

    inputs: int
    outputs: int
    stride: int = 1
    size: Pair = (1, 1)

    @property
    def flops(self) -> int:
        """Of one picture."""
        return stage_flops((self.outputs, self.inputs, 3, 3), _out(self.size, (3, 3), (1, 1), (self.stride,) * 2))


@dataclass(frozen=True)
class Attention:
    """A self-attention over a map of ``size`` (height, width), ``width`` channels in all its heads together."""

    width: int
    size: Pair

    @property
    def tokens(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def flops(self) -> int:
        """Of one picture: four projections, scores, and their product with the values."""
        return 8 * self.tokens * self.width**2 + 4 * self.tokens**2 * self.width


@dataclass(frozen=True)
class ConvOp:
    """A way to factor a 3x3 convolution. ``full(conv)``: the rank that loses nothing; ``factor(weight (O, I, 3, 3),
    rank, stride, seed)``: the stages in float32; ``shapes(conv, rank)``: their shapes, for counting.
    """

    id: str
    summary: str
    full: Callable[[Conv], int]
    factor: Callable[[Tensor, int, int, int], tuple[Stage, ...]]
    shapes: Callable[[Conv, int], tuple[Stage, ...]]

    def rank(self, conv: Conv, strength: float) -> int:
        """The highest rank that still saves ``strength`` of the FLOPs; 1 where none does."""
        each = flops(self.shapes(conv, 1), conv.size)
        return max(1, min(self.full(conv), int((1 - strength) * conv.flops / each)))


@dataclass(frozen=True)
class AttentionOp:
    """A cheaper self-attention. ``saved(attention, strength)``: FLOPs of one picture; ``frees``: whether the layer's
    weights are not needed any more.
    """

    id: str
    summary: str
    saved: Callable[[Attention, float], int]
    frees: bool = False


def stage_flops(weight: tuple[int, ...], out: Pair) -> int:
    """FLOPs of one convolution of one picture; ``out``: (height, width) of its result."""
    return 2 * torch.Size(weight).numel() * out[0] * out[1]


def flops(stages: tuple[Stage, ...], size: Pair) -> int:
    """FLOPs of all ``stages`` (or `torch.nn.Conv2d` like them) on one picture of ``size``."""
    total = 0
    for s in stages:
        size = _out(size, tuple(s.weight.shape[2:]), s.padding, s.stride)
        total += stage_flops(tuple(s.weight.shape), size)
    return total


def run(stages: tuple[Stage, ...], x: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the stages make of ``x`` (B, C, H, W): the reference."""
    for i, s in enumerate(stages):
        last = bias if i == len(stages) - 1 else None
        x = functional.conv2d(x, s.weight, last, s.stride, s.padding, 1, s.groups)
    return x


def _out(size: Pair, kernel: tuple[int, ...], padding: Pair, stride: tuple[int, ...]) -> Pair:
    h, w = ((n + 2 * p - k) // s + 1 for n, k, p, s in zip(size, kernel, padding, stride, strict=True))
    return h, w


def _crossed(down: Tensor, up: Tensor, stride: int) -> tuple[Stage, ...]:
    """``down`` (r, I, 3, 1), then ``up`` (O, r, 1, 3)."""
    return Stage(down, (stride, 1), (1, 0)), Stage(up, (1, stride), (0, 1))


def factor_low_rank(weight: Tensor, rank: int, stride: int, seed: int) -> tuple[Stage, ...]:
    """The singular values are shared evenly between the stages."""
    o, i = weight.shape[:2]
    matrix = weight.float().permute(0, 3, 1, 2).reshape(3 * o, 3 * i)
    up, down = balanced(*truncated(matrix, rank, seed))
    r = up.shape[1]
    first = down.t().reshape(r, i, 3, 1).contiguous()
    return _crossed(first, up.reshape(o, 3, r).permute(0, 2, 1).reshape(o, r, 1, 3).contiguous(), stride)


def _low_rank_shapes(conv: Conv, rank: int) -> tuple[Stage, ...]:
    first = torch.empty(rank, conv.inputs, 3, 1, device="meta")
    return _crossed(first, torch.empty(conv.outputs, rank, 1, 3, device="meta"), conv.stride)


def _by_channel(filters: Tensor, points: Tensor, stride: int, channels: int) -> tuple[Stage, ...]:
    """``filters`` (I k, 1, 3, 3), then ``points`` (O, I k, 1, 1)."""
    return Stage(filters, (stride, stride), (1, 1), channels), Stage(points, (1, 1), (0, 0))


def factor_separable(weight: Tensor, rank: int, stride: int, seed: int) -> tuple[Stage, ...]:
    """``seed`` is not needed, all is exact."""
    o, i = weight.shape[:2]
    k = min(rank, 9, o)
    channels = weight.float().permute(1, 0, 2, 3).reshape(i, o, 9)
    u, s, v = torch.linalg.svd(channels, full_matrices=False)  # (I, O, m), (I, m), (I, m, 9)
    root = s[:, :k].clamp(min=0).sqrt()
    filters = (v[:, :k] * root.unsqueeze(2)).reshape(i * k, 1, 3, 3).contiguous()
    points = (u[:, :, :k] * root.unsqueeze(1)).permute(1, 0, 2).reshape(o, i * k, 1, 1).contiguous()
    return _by_channel(filters, points, stride, i)


def _separable_shapes(conv: Conv, rank: int) -> tuple[Stage, ...]:
    filters = torch.empty(conv.inputs * rank, 1, 3, 3, device="meta")
    points = torch.empty(conv.outputs, conv.inputs * rank, 1, 1, device="meta")
    return _by_channel(filters, points, conv.stride, conv.inputs)


def pool_area(strength: float) -> Pair:
    """The smallest area that saves ``strength`` of the keys; the largest where none does."""
    return next((area for share, area in KERNELS if strength <= share), KERNELS[-1][1])


def pooled(tokens: Tensor, size: Pair, area: Pair) -> Tensor:
    """``tokens`` (B, H W, C) -> (B, ceil(H / a) ceil(W / b), C); at the edges the mean of what is there."""
    h, w = size
    maps = tokens.unflatten(1, (h, w)).movedim(3, 1)
    fewer = functional.avg_pool2d(maps, area, ceil_mode=True, count_include_pad=False)
    return fewer.flatten(2).transpose(1, 2)


def _pool_saves(attention: Attention, strength: float) -> int:
    a, b = pool_area(strength)
    gone = attention.tokens - -(-attention.size[0] // a) * -(-attention.size[1] // b)
    return 4 * gone * attention.width**2 + 4 * attention.tokens * gone * attention.width


def relu_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """``q`` (B, L, C), ``k`` and ``v`` (B, n, C), C the heads' widths side by side -> (B, L, C)."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5
    parts = []
    for part in q.split(CHUNK, dim=2):
        # 1 / n before the product: half precision must not overflow over thousands of keys.
        weights = torch.relu((part * scale) @ k.transpose(2, 3)) / k.shape[2]
        parts.append(weights @ v)
    return torch.cat(parts, dim=2).transpose(1, 2).flatten(2)


POOL = AttentionOp("pool", "keys and values averaged over neighbours", _pool_saves)
SKIP = AttentionOp("skip", "no self-attention", lambda attention, strength: attention.flops, frees=True)
RELU = AttentionOp("relu", "relu in place of softmax", lambda attention, strength: 0)
LOW_RANK = ConvOp(
    "low rank",
    "3x1 then 1x3 through fewer channels, by singular values",
    lambda conv: 3 * min(conv.inputs, conv.outputs),
    factor_low_rank,
    _low_rank_shapes,
)
SEPARABLE = ConvOp(
    "separable",
    "a few 3x3 filters of each channel, then 1x1",
    lambda conv: min(9, conv.outputs),
    factor_separable,
    _separable_shapes,
)
ATTENTIONS = {op.id: op for op in (POOL, SKIP, RELU)}
CONVOLUTIONS = {op.id: op for op in (LOW_RANK, SEPARABLE)}
