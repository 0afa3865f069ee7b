"""How far two images are apart. Images are float (..., H, W, C) in [0, 1]."""

from __future__ import annotations

import math

import numpy as np


def psnr(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; infinity for equal images. Raises ValueError for different shapes.

    A constant difference c gives -20 log10(c).
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"images differ in shape: {reference.shape} and {candidate.shape}")
    mse = float(np.mean((reference.astype(np.float64) - candidate.astype(np.float64)) ** 2))
    return math.inf if mse == 0 else -10 * math.log10(mse)


def mean_psnr(references: list[np.ndarray], candidates: list[np.ndarray]) -> float:
    """Mean of the images' PSNRs in dB, as papers report it."""
    return float(np.mean([psnr(r, c) for r, c in zip(references, candidates, strict=True)]))
