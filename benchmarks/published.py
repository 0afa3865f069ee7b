"""Calibration recipes to compare with: SVDQuant's as published and as DeepCompressor runs it, and plain rounding.

39 candidates s = max|x|^a / max|w|^b, (a, b) in {(0, 0)} + {(a, 0)} + {(a, 1 - a)}, a = 1/20 .. 19/20; each gets its
own SVD and is scored by the error of the layer's output. (DeepCompressor does a full fp64 SVD each and half a million
tokens; here it is a randomised SVD and `TOKENS`, which measured the same quality. Source: mit-han-lab/deepcompressor
v0.1.0.)
"""

# ruff: noqa: TID251
from __future__ import annotations

from dataclasses import replace

import torch
from comfyui_nibble.quant.calib import low_rank
from comfyui_nibble.quant.calib.presets import Preset
from comfyui_nibble.quant.calib.smooth import WEIGHT_STEPS
from comfyui_nibble.quant.scales import rounded
from torch import Tensor

TOKENS = 1024
STEPS = 20
GRID = (
    [(0.0, 0.0)] + [(i / STEPS, 0.0) for i in range(1, STEPS)] + [(i / STEPS, 1 - i / STEPS) for i in range(1, STEPS)]
)


def search(w: Tensor, x: Tensor, amax: Tensor, rank: int, shift: float, qmax: int, seed: int) -> Tensor:
    """The candidate whose layer output on ``TOKENS`` tokens is closest: s (K,)."""
    x = x[:TOKENS]
    wmax, amax = w.abs().amax(0).clamp(min=1e-5), amax.clamp(min=1e-5)
    y = x @ w.t()
    best, lowest = torch.ones_like(amax), torch.inf
    for a, b in GRID:
        s = (amax**a / wmax**b).clamp(1e-4, 1e4)
        up, down = low_rank.truncated(w * s, rank, seed)
        residual = rounded(w * s - up @ down.t(), WEIGHT_STEPS)
        seen = rounded((x + shift) / s, qmax)
        got = seen @ residual.t() + (x / s) @ down @ up.t() - shift * (residual / s).sum(1)
        error = float((got - y).square().sum())
        if error < lowest:
            best, lowest = s, error
    return best


def iterate(w: Tensor, s: Tensor, branch: tuple[Tensor, Tensor], x: Tensor, seed: int, rounds: int = 100):
    """(up, down): SVD of W s - Q(W s - L) again and again from ``branch``; stops at the first round that does not
    improve the output on ``x``.
    """
    target, y = w * s, x @ w.t()

    def left(up: Tensor, down: Tensor) -> Tensor:
        return rounded(target - up @ (down * s.unsqueeze(1)).t(), WEIGHT_STEPS)

    def error(up: Tensor, down: Tensor) -> float:
        return float((x @ (left(up, down) / s + up @ down.t()).t() - y).square().sum())

    lowest = error(*branch)
    for _ in range(rounds):
        up, down = low_rank.truncated(target - left(*branch), branch[0].shape[1], seed)
        found = (up, down / s.unsqueeze(1))
        reached = error(*found)
        if reached >= lowest:
            break
        branch, lowest = found, reached
    return branch


PUBLISHED = Preset(
    "published", "SVDQuant as published: 39-point smoothing grid, SVD of W s, absmax / 7",
    tokens=4096, smoothing=search, searched=False,
)  # fmt: skip
ITERATED = replace(
    PUBLISHED, id="published_iterated", summary="published, with up to 100 low-rank iterations", iterate=iterate
)
ROWS = {
    p.id: p
    for p in (
        PUBLISHED,
        ITERATED,
        replace(
            ITERATED, id="published_gptq", gptq=True,
            summary="published, with low-rank iterations and GPTQ (DeepCompressor's gptq.yaml)",
        ),
        Preset("nearest", "round to nearest with absmax / 7, no low rank", searched=False, low_rank=False),
    )
}  # fmt: skip
