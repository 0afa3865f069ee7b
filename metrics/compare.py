"""A batch of pictures against its references: numbers for each pair, and pictures that show where they differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import images, optional
from .table import Scores, mean


@dataclass(frozen=True)
class Comparison:
    """``psnr``, ``ssim``: means over the pairs. Pictures are (n, H, W, 3) in [0, 1]: the difference's heat map, both
    with it side by side, and the pairs in turn (reference, candidate, reference ...) for a slider.
    """

    scores: Scores
    psnr: float
    ssim: float
    heat: np.ndarray
    beside: np.ndarray
    pair: np.ndarray


def compare(
    references: np.ndarray, candidates: np.ndarray, names: tuple[str, str], full: float = 0.25, perceptual: bool = True
) -> Comparison:
    """Compares (n, H, W, 3) with (n, H, W, 3); one reference serves for all. ``full``: the difference drawn white.

    ``perceptual``: try LPIPS; a note says what is missing. Raises ValueError for sizes or numbers that do not match.
    """
    if references.shape[1:] != candidates.shape[1:]:
        (rh, rw), (ch, cw) = references.shape[1:3], candidates.shape[1:3]
        raise ValueError(f"the reference is {rw} x {rh} and the candidate {cw} x {ch} pixels. Resize one of them first")
    if len(references) not in (1, len(candidates)):
        raise ValueError(
            f"{len(references)} references and {len(candidates)} candidates: give one reference, or as many"
        )
    pairs = [(references[i if len(references) > 1 else 0], c) for i, c in enumerate(candidates)]
    each = {
        "PSNR (dB)": [images.psnr(r, c) for r, c in pairs],
        "SSIM": [images.ssim(r, c) for r, c in pairs],
        "largest difference": [float(images.difference(r, c).max()) for r, c in pairs],
    }
    notes = [f"PSNR, SSIM: higher is closer. Heat map: black is equal, white a difference of {full:g} or more."]
    if perceptual:
        try:
            each["LPIPS"] = optional.lpips(pairs)
        except optional.Missing as e:
            notes.append(str(e))
    heat = np.stack([images.heat_map(r, c, full) for r, c in pairs]).astype(np.float32)
    beside = np.stack([
        images.side_by_side([(names[0], r), (names[1], c), ("difference", h)])
        for (r, c), h in zip(pairs, heat, strict=True)
    ])  # fmt: skip
    overall = {name: mean(values) for name, values in each.items()}
    titles = tuple(f"{names[1]} {i + 1}" if len(pairs) > 1 else names[1] for i in range(len(pairs)))
    scores = Scores(titles, each, overall, tuple(notes))
    turns = np.stack([p for pair in pairs for p in pair])
    return Comparison(scores, overall["PSNR (dB)"], overall["SSIM"], heat, beside, turns)
