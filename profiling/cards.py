"""What is known of graphics cards before anything is measured: memory, bandwidth, and what their tensor cores could do
at best. One table; whoever needs a hardware fact reads it here.

Tensor rates are not typed in but computed: units x boost clock x operations per unit and clock of the architecture
(dense, 16-bit with 32-bit accumulation). Source: NVIDIA's architecture whitepapers (Turing, GA100, GA102, Ada, Hopper,
RTX Blackwell) and AMD's RDNA3 guide; e.g. RTX 4090: 128 x 2.52 GHz x 512 = 165.2 TFLOPS, as the Ada paper says.
``gib`` is what programs get: cards with error correction or a firmware region keep some of what is on the box.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
# The driver's own memory for one program, before any tensor; `nibble profile` measures it on a GPU. Source: NVML on
# CUDA 12 and 13 shows 0.4 to 0.6 GiB.
CONTEXT = GIB // 2


@dataclass(frozen=True)
class Architecture:
    """Operations per unit (SM, CU) and clock; ``four_bit`` 0 means its tensor cores have no 4-bit mode. Which files run
    natively on it: quant/machine.py.
    """

    id: str
    compute: tuple[int, ...]  # CUDA compute capabilities, major * 10 + minor
    fp16: int
    int8: int
    four_bit: int
    gfx: str = ""  # AMD's name of it


@dataclass(frozen=True)
class Card:
    """``bandwidth`` in GB/s (10^9), ``boost`` in GHz."""

    name: str
    gib: float
    bandwidth: float
    units: int
    boost: float
    architecture: str

    @property
    def nbytes(self) -> int:
        return int(self.gib * GIB)

    def rate(self, kind: str) -> float:
        """Operations per second at best. ``kind``: fp16, int8 or four_bit (fp16's rate where there is no such mode)."""
        arch = ARCHITECTURES[self.architecture]
        return self.units * self.boost * 1e9 * (getattr(arch, kind) or arch.fp16)


ARCHITECTURES: dict[str, Architecture] = {a.id: a for a in (
    Architecture("Turing", (75,), 512, 2048, 4096),
    Architecture("Turing datacenter", (75,), 1024, 2048, 4096),
    Architecture("Ampere", (86, 87), 512, 2048, 4096),
    Architecture("Ampere datacenter", (80,), 2048, 4096, 8192),
    Architecture("Ada", (89,), 512, 2048, 4096),
    Architecture("Ada datacenter", (89,), 1024, 2048, 4096),
    Architecture("Hopper", (90,), 4096, 8192, 0),
    Architecture("Blackwell", (100, 103, 120, 121), 512, 2048, 4096),
    Architecture("RDNA3", (), 512, 512, 1024, "gfx1100"),
)}  # fmt: skip

CARDS: dict[str, Card] = {c.name: c for c in (
    Card("RTX 2080 Ti 11 GB", 10.7, 616, 68, 1.635, "Turing"),
    Card("RTX 3060 12 GB", 11.7, 360, 28, 1.777, "Ampere"),
    Card("RTX 3070 8 GB", 7.7, 448, 46, 1.725, "Ampere"),
    Card("RTX 3080 10 GB", 9.7, 760, 68, 1.710, "Ampere"),
    Card("RTX 3090 24 GB", 23.6, 936, 82, 1.695, "Ampere"),
    Card("RTX 4060 8 GB", 7.6, 272, 24, 2.460, "Ada"),
    Card("RTX 4060 Ti 16 GB", 15.6, 288, 34, 2.535, "Ada"),
    Card("RTX 4070 12 GB", 11.6, 504, 46, 2.475, "Ada"),
    Card("RTX 4080 16 GB", 15.6, 717, 76, 2.505, "Ada"),
    Card("RTX 4090 24 GB", 23.5, 1008, 128, 2.520, "Ada"),
    Card("RTX 5060 Ti 16 GB", 15.5, 448, 36, 2.572, "Blackwell"),
    Card("RTX 5070 12 GB", 11.5, 672, 48, 2.512, "Blackwell"),
    Card("RTX 5080 16 GB", 15.5, 960, 84, 2.617, "Blackwell"),
    Card("RTX 5090 32 GB", 31.4, 1792, 170, 2.407, "Blackwell"),
    Card("RX 7900 XTX 24 GB", 23.9, 960, 96, 2.500, "RDNA3"),
    Card("T4 16 GB", 14.6, 320, 40, 1.590, "Turing datacenter"),
    Card("L4 24 GB", 22.0, 300, 58, 2.040, "Ada datacenter"),
    Card("A100 80 GB", 79.1, 2039, 108, 1.410, "Ampere datacenter"),
    Card("H100 80 GB", 79.1, 3350, 132, 1.830, "Hopper"),
    Card("H200 141 GB", 139.8, 4800, 132, 1.830, "Hopper"),
)}  # fmt: skip
