"""Self-attention without softmax: relu(Q K^T / sqrt d) V / n, n the number of keys. Source: MobileDiffusion.

It has the same two products, so no FLOPs are saved as counters count; what goes is the softmax, which phones are
slow at. A model that was trained with softmax draws badly with it until it is trained on (the paper: 10,000 steps).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Attention, AttentionOp

CHUNK = 1024  # queries at once: the scores are stored, (B, heads, CHUNK, keys)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """``q`` (B, L, C), ``k`` and ``v`` (B, n, C), C the heads' widths side by side -> (B, L, C)."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5
    parts = []
    for part in q.split(CHUNK, dim=2):
        # 1 / n before the product: half precision must not overflow over thousands of keys.
        weights = torch.relu((part * scale) @ k.transpose(2, 3)) / k.shape[2]
        parts.append(weights @ v)
    return torch.cat(parts, dim=2).transpose(1, 2).flatten(2)


def saved(attention: Attention, strength: float) -> int:
    return 0


OP = AttentionOp("relu", "relu in place of softmax", saved)
