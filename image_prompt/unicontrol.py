"""Uni-ControlNet's global adapter: an image's CLIP embedding becomes four tokens that are appended to the text.

    y = FF2(LN(FF1(LN(e)))), cut into (B, 4, d)     FF: x -> W2 (a GELU(g)) + b2 with (a, g) = halves of W1 x + b1

Keys under ``global_adapter.``: ``norm1`` (d), ``ff1.net.0.proj`` (2 m d, d), ``ff1.net.2`` (2 d, m d), ``norm2`` (2 d),
``ff2.net.0.proj`` (4 m d, 2 d), ``ff2.net.2`` (4 d, 2 m d); d = 768 and m = 4 in the published file: 47,213,568
parameters. Source: Zhao et al., Uni-ControlNet, arXiv 2305.16322.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

PREFIX = "global_adapter."
TOKENS = 4


class _Geglu(nn.Module):
    def __init__(self, inputs: int, inner: int, bias: bool, device=None):
        super().__init__()
        self.proj = nn.Linear(inputs, 2 * inner, bias=bias, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class _FeedForward(nn.Module):
    def __init__(self, inputs: int, inner: int, outputs: int, bias: bool, device=None):
        super().__init__()
        last = nn.Linear(inner, outputs, bias=bias, device=device)
        self.net = nn.Sequential(_Geglu(inputs, inner, bias, device), nn.Identity(), last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class GlobalAdapter(nn.Module):
    """(B, d) image embeddings -> (B, 4, d) tokens. ``inner``: widths inside the two feed-forwards."""

    def __init__(self, width: int, inner: tuple[int, int], bias: bool = True, device=None):
        super().__init__()
        self.width = width
        self.norm1, self.norm2 = nn.LayerNorm(width, device=device), nn.LayerNorm(2 * width, device=device)
        self.ff1 = _FeedForward(width, inner[0], 2 * width, bias, device)
        self.ff2 = _FeedForward(2 * width, inner[1], TOKENS * width, bias, device)

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        return self.ff2(self.norm2(self.ff1(self.norm1(embeds)))).unflatten(-1, (TOKENS, self.width))


def from_shapes(shapes: Mapping[str, tuple[int, ...]], device=None) -> GlobalAdapter:
    """The adapter with these keys (without the prefix). Raises ValueError when one that sizes it is missing."""
    needed = ("norm1.weight", "ff1.net.0.proj.weight", "ff2.net.0.proj.weight")
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(f"{PREFIX}{missing[0]} is missing, so it is no global adapter of Uni-ControlNet")
    width, one, two = (shapes[name][0] for name in needed)
    return GlobalAdapter(width, (one // 2, two // 2), "ff1.net.2.bias" in shapes, device)
