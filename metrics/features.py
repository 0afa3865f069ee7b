"""Measures on feature vectors, whoever made them: cosine means (CLIP-T, CLIP-I), Frechet distance, kernel distance.

Features are float (n, d). Nothing here knows a network: what the numbers mean is what the features mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

KID_SUBSET, KID_SUBSETS = 1000, 100  # Source: Binkowski et al. 2018, as torch-fidelity and torchmetrics run it


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, float64. Raises ValueError for anything but a finite (n, d) matrix without zero rows."""
    x = as_features(x)
    length = x.norm(dim=1, keepdim=True)
    if bool((length == 0).any()):
        raise ValueError("a feature vector is all zeros: its cosine with anything is undefined")
    return x / length


def as_features(x: Tensor) -> Tensor:
    """``x`` as float64. Raises ValueError unless it is a finite (n, d) matrix with at least one row."""
    if x.dim() != 2 or x.shape[0] == 0:
        raise ValueError(f"features must be a matrix with a row for each picture, got shape {tuple(x.shape)}")
    x = x.detach().cpu().double()
    if not torch.isfinite(x).all():
        raise ValueError("the features hold NaN or infinity")
    return x


def mean_cosine(x: Tensor, y: Tensor) -> float:
    """Mean over all pairs of a row of ``x`` with a row of ``y``, 1 / (N K) sum_i sum_k cos(x_k, y_i). Symmetric.

    How alike two sets are; whether pictures are like their own references: `pairing.clip_i`.
    """
    a, b = same_width(unit(x), unit(y))
    return float((a @ b.t()).mean())


def paired_cosine(x: Tensor, y: Tensor) -> Tensor:
    """(n,) cosine of each row of ``x`` with the same row of ``y``: CLIP-T of pictures and their own prompts."""
    a, b = same_width(unit(x), unit(y))
    if a.shape != b.shape:
        raise ValueError(f"{a.shape[0]} pictures and {b.shape[0]} texts cannot be paired: give one text a picture")
    return (a * b).sum(1)


def frechet(x: Tensor, y: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to the rows: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    With Inception features this is FID. Source: Heusel et al. 2017. Raises ValueError for fewer than two rows.
    """
    x, y = same_width(as_features(x), as_features(y))
    if min(len(x), len(y)) < 2:
        raise ValueError("a Frechet distance needs at least two pictures on each side")
    return frechet_gaussians(x.mean(0), torch.cov(x.t()), y.mean(0), torch.cov(y.t()))


def frechet_gaussians(m1: Tensor, c1: Tensor, m2: Tensor, c2: Tensor) -> float:
    """Frechet distance of N(m1, c1) and N(m2, c2); means (d,), covariances (d, d)."""
    c1, c2 = (c.double().reshape(m1.numel(), m1.numel()) for c in (c1, c2))
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.t()
    # C1 C2 and root C2 root have the same eigenvalues, and the latter is symmetric.
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    shift = (m1.double() - m2.double()).square().sum()
    return max(0.0, float(shift + c1.trace() + c2.trace() - 2 * cross))


def kernel_distance(x: Tensor, y: Tensor, seed: int = 0) -> tuple[float, float]:
    """KID: (mean, standard deviation) of the unbiased squared MMD with the kernel (x.y / d + 1)^3.

    Over `KID_SUBSETS` random subsets of `KID_SUBSET` rows; with fewer rows once over all of them (deviation 0).
    """
    x, y = same_width(as_features(x), as_features(y))
    n = min(len(x), len(y))
    if n < 2:
        raise ValueError("a kernel distance needs at least two pictures on each side")
    if n <= KID_SUBSET:
        return mmd(x, y), 0.0
    g = torch.Generator().manual_seed(seed)
    values = torch.tensor([
        mmd(x[torch.randperm(len(x), generator=g)[:KID_SUBSET]], y[torch.randperm(len(y), generator=g)[:KID_SUBSET]])
        for _ in range(KID_SUBSETS)
    ])  # fmt: skip
    return float(values.mean()), float(values.std(correction=0))


def mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the cubic kernel."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.t() / a.shape[1] + 1) ** 3

    def others(k: Tensor) -> Tensor:  # mean over pairs of two different rows
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return float(others(kernel(x, x)) + others(kernel(y, y)) - 2 * kernel(x, y).mean())


def same_width(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are. Raises ValueError for matrices of different width."""
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and {y.shape[1]} numbers cannot be compared: use one encoder")
    return x, y
