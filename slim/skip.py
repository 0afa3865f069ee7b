"""Self-attention left out: the layer adds nothing. MobileDiffusion's UNet has none at its highest resolutions."""

from __future__ import annotations

from .op import Attention, AttentionOp


def saved(attention: Attention, strength: float) -> int:
    return attention.flops


OP = AttentionOp("skip", "no self-attention", saved, frees=True)
