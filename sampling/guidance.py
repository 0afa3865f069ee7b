"""The guidance scale inside a full LCM: an embedding that its first time layer adds up, hence a constant bias."""

from __future__ import annotations

import torch
from torch import Tensor


def omega_embedding(scale: float, dim: int = 256) -> Tensor:
    """(dim,) float32 sines then cosines of the guidance ``scale``; omega = scale - 1 is what the paper counts.

    Source: arXiv 2310.04378, section 4.2; diffusers get_guidance_scale_embedding. In float32 as there: angles reach
    13500, and models were trained with what rounding makes of them.
    """
    half = dim // 2
    step = torch.tensor(10000.0).log() / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -step)
    angles = torch.tensor(scale - 1.0) * 1000.0 * frequencies
    return torch.cat([angles.sin(), angles.cos()])


def omega_bias(scale: float, projection: Tensor, time_weight: Tensor) -> Tensor:
    """(N,) float32 to add to the first time layer's bias: time_weight @ (projection @ embedding).

    projection (C, dim) is the file's time_embedding.cond_proj, time_weight (N, C). The UNet adds the projected
    embedding to its time features before that linear layer, so both are the same. Raises ValueError when the widths
    differ.
    """
    if projection.dim() != 2 or projection.shape[0] != time_weight.shape[1] or projection.shape[1] % 2:
        raise ValueError(
            f"the guidance embedding has shape {tuple(projection.shape)} and this model's time layer takes "
            f"{time_weight.shape[1]} features: use the LCM file that this model was loaded from"
        )
    embedding = omega_embedding(scale, projection.shape[1])
    return (time_weight.double() @ (projection.double() @ embedding.double())).float()
