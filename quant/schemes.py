"""The numeric recipes of this pack, one row each. A scheme says how numbers are rounded, not how bytes lie."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 64  # columns of a weight that share a scale
KEEP = "keep"  # not a scheme: the layer stays in 16 bits
ROWS = 8  # kernels read scales and write outputs 16 bytes at a time


@dataclass(frozen=True)
class QuantScheme:
    """``group_size``: K-elements that share one weight scale. ``act_bits`` 16 means activations are not quantized."""

    id: str
    weight_bits: int
    act_bits: int
    group_size: int
    low_rank: bool
    zero_point: bool
    summary: str

    def __post_init__(self):
        if not (0 < self.weight_bits <= 16 and 0 < self.act_bits <= 16 and self.group_size > 0):
            raise ValueError(f"scheme {self.id}: bits and group size must be positive")

    def fits(self, n: int, k: int) -> bool:
        """Whether an (N, K) linear can take this scheme."""
        return n > 0 and n % ROWS == 0 and k % self.group_size == 0

    def bytes(self, n: int, k: int, rank: int = 0, side: int = 2) -> int:
        """Bytes of an (N, K) weight as stored, without bias; ``side`` bytes for each scale and low-rank element."""
        groups = k // self.group_size
        total = n * k * self.weight_bits // 8 + side * groups * n * (2 if self.zero_point else 1)
        return total + (side * (rank * (n + k) + k) if self.low_rank else 0)


SVDQUANT = QuantScheme(
    "svdquant_w4a4", 4, 4, GROUP, low_rank=True, zero_point=False,
    summary="int4 weights and activations, a 16-bit low-rank branch for the outliers (SVDQuant)",
)  # fmt: skip
AWQ = QuantScheme(
    "awq_w4a16", 4, 16, GROUP, low_rank=False, zero_point=True,
    summary="int4 weights with zero points, 16-bit activations: for modulations and text projections",
)  # fmt: skip

SCHEMES: dict[str, QuantScheme] = {s.id: s for s in (SVDQUANT, AWQ)}
# What a model can be quantized to; after the first, the formats of ComfyUI's own: `core_formats.FORMATS`.
TARGETS = (SVDQUANT.id, "nvfp4", "convrot_w4a4", "asym_w4a8_int8", "int8_tensorwise")


def scheme(id: str) -> QuantScheme:
    """The row named ``id``. Raises ValueError that lists what there is."""
    try:
        return SCHEMES[id]
    except KeyError:
        raise ValueError(f"unknown scheme {id!r}; this version knows {', '.join(SCHEMES)}") from None
