"""Where the rank goes: before rounding, to what rounding would hurt most; after it, to what rounding did hurt.

The refit is reduced-rank regression on the outputs: the best rank-R L for sum_t |x_t (Lf - L)^T|^2 is the projection of
the residual Lf on the top eigenvectors of Lf H Lf^T, H the (shrunk) Gram matrix of the inputs. Subspace iteration
applies H from both sides of thin blocks, so a layer costs O(N K R), not O(N K M); H is made once per layer input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..datafree import ITERATIONS, OVERSAMPLE, svd
from ..schemes import GROUP
from .smooth import PEAK, WEIGHT_STEPS


def shrunk(gram: Tensor, share: float) -> Tensor:
    """(1 - share) gram + share diag(gram)."""
    out = gram * (1 - share)
    out.diagonal().add_(gram.diagonal(), alpha=share)
    return out


def truncated(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """(up (N, r), down (K, r)): the best rank-r part of ``weight`` (N, K), singular values on ``up``."""
    u, s, v = svd(weight, rank, seed)
    return u * s, v


def noise_weights(x: Tensor, s: Tensor, shift: float, qmax: int) -> Tensor:
    """q (K,): how much output noise a unit of smoothed weight brings, from both roundings; constant within a group."""
    xs = ((x + shift) / s).reshape(x.shape[0], -1, GROUP)
    v = (xs.abs().amax(-1) / qmax).square().mean(0) / 12
    u = (x / s).square().reshape(x.shape[0], -1, GROUP).mean((0, 2)) * PEAK**2 / (12 * WEIGHT_STEPS**2)
    return (u + v).sqrt().clamp(min=1e-12).repeat_interleave(GROUP)


def weighted(weight: Tensor, s: Tensor, q: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """(up, down) of ``weight`` by the SVD of W diag(s q): raw-x domain, spent where rounding noise is largest."""
    scale = s * q
    up, down = truncated(weight * scale, rank, seed)
    return up, down / scale.unsqueeze(1)


def refit(missed: Tensor, gram: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """(up (N, r), down (K, r)) closest to ``missed`` (N, K) in the outputs: min |(missed - up down^T) gram^(1/2)|."""
    n, k = missed.shape
    r = min(rank, n, k)
    q = min(r + OVERSAMPLE, n)
    g = torch.Generator(device="cpu").manual_seed(seed)
    basis = torch.randn(n, q, generator=g).to(missed.device)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(missed @ (gram @ (missed.t() @ basis))).Q
    half = missed.t() @ basis
    _, vectors = torch.linalg.eigh(half.t() @ (gram @ half))
    up = basis @ vectors[:, -r:].flip(-1)
    return up, missed.t() @ up


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with each column's size shared evenly: neither half leaves fp16's range."""
    sizes = up.norm(dim=0).clamp(min=1e-20), down.norm(dim=0).clamp(min=1e-20)
    ratio = (sizes[1] / sizes[0]).sqrt()
    return up * ratio, down / ratio
