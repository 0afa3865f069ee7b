"""What every format hands out for one layer."""

from __future__ import annotations

from dataclasses import dataclass

from ...quant.parts import Parts, Plain


@dataclass(frozen=True)
class StoredLayer:
    """One 4-bit layer as read: plain tensors in natural order, and whether the file had them tile-packed.

    ``form``: the row of the formats' table that it came from.
    """

    weight: Plain | Parts
    tiled: bool = False
    form: str = "comfy_quant"
