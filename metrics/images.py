"""How far two images are apart. Images are float (..., H, W, C) in [0, 1]."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional

SIGMA, RADIUS = 1.5, 5  # of SSIM's Gaussian window: 11 x 11
C1, C2 = 0.01**2, 0.03**2
# The heat map's colours from no difference to the most: black, blue, red, yellow, white.
HEAT = np.array([(0, 0, 0), (0.1, 0.2, 0.7), (0.9, 0.15, 0.15), (1, 0.85, 0.1), (1, 1, 1)])
GAP, HEAD = 8, 36


def psnr(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; infinity for equal images. Raises ValueError for different shapes.

    A constant difference c gives -20 log10(c).
    """
    same_shape(reference, candidate)
    mse = float(np.mean((reference.astype(np.float64) - candidate.astype(np.float64)) ** 2))
    return math.inf if mse == 0 else -10 * math.log10(mse)


def mean_psnr(references: list[np.ndarray], candidates: list[np.ndarray]) -> float:
    """Mean of the images' PSNRs in dB, as papers report it."""
    return float(np.mean([psnr(r, c) for r, c in zip(references, candidates, strict=True)]))


def ssim(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Structural similarity of two (H, W, C) images, 1 for equal ones: mean over channels and every pixel's window.

    Source: Wang et al. 2004, with the 11 x 11 Gaussian of sigma 1.5; edges are mirrored, as torchmetrics does. Raises
    ValueError for different shapes or images smaller than half a window.
    """
    same_shape(reference, candidate)
    if min(reference.shape[:2]) <= RADIUS:
        raise ValueError(f"SSIM needs images of more than {RADIUS} pixels a side, got {reference.shape[:2]}")
    x, y = (torch.from_numpy(np.moveaxis(a.astype(np.float64), -1, 0).copy())[:, None] for a in (reference, candidate))
    mx, my, xx, yy, xy = (_blur(t) for t in (x, y, x * x, y * y, x * y))
    vx, vy, cov = (xx - mx * mx).clamp(min=0), (yy - my * my).clamp(min=0), xy - mx * my
    top = (2 * mx * my + C1) * (2 * cov + C2)
    return float((top / ((mx * mx + my * my + C1) * (vx + vy + C2))).mean())


def _blur(x: torch.Tensor) -> torch.Tensor:
    """(C, 1, H, W) through the window, edges mirrored."""
    x = functional.pad(x, (RADIUS,) * 4, mode="reflect")
    t = torch.arange(-RADIUS, RADIUS + 1, dtype=x.dtype)
    g = torch.exp(-(t**2) / (2 * SIGMA**2))
    g = g / g.sum()
    return functional.conv2d(functional.conv2d(x, g.view(1, 1, -1, 1)), g.view(1, 1, 1, -1))


def same_shape(reference: np.ndarray, candidate: np.ndarray) -> None:
    """Raises ValueError for images of different shapes."""
    if reference.shape != candidate.shape:
        raise ValueError(f"images differ in shape: {reference.shape} and {candidate.shape}")


def difference(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """(H, W): the largest absolute difference of any channel."""
    same_shape(reference, candidate)
    return np.abs(reference.astype(np.float64) - candidate.astype(np.float64)).max(-1)


def heat_map(reference: np.ndarray, candidate: np.ndarray, full: float = 0.25) -> np.ndarray:
    """(H, W, 3): black where equal, blue, red, yellow, and white where the difference is ``full`` or more."""
    at = np.clip(difference(reference, candidate) / full, 0, 1) * (len(HEAT) - 1)
    low = np.minimum(at.astype(int), len(HEAT) - 2)
    part = (at - low)[..., None]
    return HEAT[low] * (1 - part) + HEAT[low + 1] * part


def side_by_side(pictures: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """(H', W', 3): pictures of one size in a row, each under its label."""
    height, width = pictures[0][1].shape[:2]
    pixels = max(10, min(24, width // 9))
    font = ImageFont.load_default(pixels)
    sheet = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height + HEAD), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, (label, picture) in enumerate(pictures):
        x = i * (width + GAP)
        draw.text((x + 2, (HEAD - pixels) // 2 - 2), label, (32, 33, 36), font=font)
        sheet.paste(Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8)), (x, HEAD))
    return np.asarray(sheet, np.float32) / 255
