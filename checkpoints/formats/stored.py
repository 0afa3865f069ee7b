"""What every format hands out for one layer, and the JSON that ComfyUI's contract keeps beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant.core_low_rank import CoreLowRankWeight
from ...quant.parts import Parts, Plain


@dataclass(frozen=True)
class StoredLayer:
    """One 4-bit layer as read: plain tensors in natural order, and whether the file had them tile-packed.

    form       the row of the formats' table that it came from
    padded     it may be larger than the model's layer
    unsigned   its activations are, where its place in the model says so
    woven      the rows of a modulation's vectors take turns, where its place says that it is one
    """

    weight: Plain | Parts | CoreLowRankWeight
    tiled: bool = False
    form: str = "comfy_quant"
    padded: bool = False
    unsigned: bool = False
    woven: bool = False


def all_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity in ``tensor``, as far as it has values."""
    return tensor.is_meta or bool(torch.isfinite(tensor.float()).all())


def encode_config(config: dict) -> Tensor:
    """JSON as the (len,) uint8 tensor of the contract."""
    return torch.tensor(list(json.dumps(config, sort_keys=True).encode()), dtype=torch.uint8)
