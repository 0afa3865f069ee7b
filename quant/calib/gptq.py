"""GPTQ (arXiv 2210.17323) for signed 4-bit groups with fixed scales: each column's rounding error is carried to the
next.

The Hessian is made of what the kernel really multiplies, the rounded activations, and is drawn towards its diagonal:
with a few thousand tokens an unshrunk one overfits (measured: docs/quantization.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..schemes import GROUP
from .low_rank import shrunk

BLOCK = 128
TRIES = 12


def inverse_factor(gram: Tensor, shrink: float, damp: float) -> tuple[Tensor, Tensor] | None:
    """(order (K,), upper Cholesky factor of the inverse Hessian in that order), or None if it will not factor.

    Columns are taken by falling diagonal. ``gram`` (K, K) float32 of the rounded, smoothed activations.
    """
    h = shrunk(gram, shrink)
    dead = h.diagonal() <= 0
    h = h / h.diagonal().mean().clamp(min=1e-30)
    h.diagonal()[dead] = 1.0
    order = h.diagonal().argsort(descending=True, stable=True)
    h = h[order][:, order]
    for _ in range(TRIES):
        attempt = h.clone()
        attempt.diagonal().add_(damp)
        factor, info = torch.linalg.cholesky_ex(attempt)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(factor)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(info) == 0:
                return order, upper
        damp *= 4
    return None


def codes(weight: Tensor, scales: Tensor, factor: tuple[Tensor, Tensor], low: int = -8, high: int = 7) -> Tensor:
    """int8 codes (N, K) of ``weight`` (N, K) for given ``scales`` (K/64, N): error feedback in the factor's order."""
    order, upper = factor
    n, k = weight.shape
    w = weight.float()[:, order].contiguous()
    s = scales.float().t().repeat_interleave(GROUP, 1)[:, order]
    s = torch.where(s == 0, 1.0, s)
    out = torch.empty(n, k, device=w.device)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        block, errors = w[:, start:stop].clone(), torch.zeros(n, stop - start, device=w.device)
        u = upper[start:stop, start:stop]
        for i in range(stop - start):
            column, scale = block[:, i], s[:, start + i]
            q = (column / scale).round_().clamp_(low, high)
            out[:, start + i] = q
            error = (column - q * scale) / u[i, i]
            block[:, i:] -= error.unsqueeze(1) * u[i, i:]
            errors[:, i] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    result = torch.empty_like(out)
    result[:, order] = out
    return result.to(torch.int8)
