"""The contract of every operation: what it saves, and what stands in for the layer.

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

Pair = tuple[int, int]


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
    """A way to factor a 3x3 convolution. ``full(conv)``: the rank that loses nothing; ``factor(weight, rank, stride,
    seed)``: the stages; ``shapes(conv, rank)``: their shapes, for counting.
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
