"""Calibration recipes, one row each. A new one is one row; `solve` reads nothing but these fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

NONE, SURROGATE = "none", "surrogate"


@dataclass(frozen=True)
class Preset:
    """How a W4A4 layer is solved.

    smoothing     none | surrogate (closed form, no forward) | a function as `search` of benchmarks/published.py
    learn         Adam steps on the surrogate after its best candidate
    weighted_svd  the branch takes what rounding noise would hurt most, not what is largest
    searched      signed -8 scale search instead of absmax / 7
    refits        rounds of (codes, then branch refitted to what they missed), in the output metric
    iterate       what goes over the branch before the codes are chosen, as `iterate` of benchmarks/published.py
    gptq          codes by error feedback through the Hessian; ``damp`` is its share of the mean diagonal
    shrink        how far Gram matrices are drawn to their diagonal, 0..1: few tokens must not be trusted further
    """

    id: str
    summary: str
    tokens: int = 0
    smoothing: str | Callable = NONE
    learn: int = 0
    weighted_svd: bool = False
    searched: bool = True
    low_rank: bool = True
    refits: int = 0
    iterate: Callable | None = None
    gptq: bool = False
    damp: float = 0.01
    shrink: float = 0.0

    def __post_init__(self):
        if self.smoothing not in (NONE, SURROGATE) and not callable(self.smoothing):
            raise ValueError(f"preset {self.id}: unknown smoothing {self.smoothing!r}")
        if not 0 <= self.shrink <= 1 or self.refits < 0 or self.learn < 0:
            raise ValueError(f"preset {self.id}: shrink is a share, counts are not negative")

    @property
    def needs_data(self) -> bool:
        return self.tokens > 0


PRESETS: dict[str, Preset] = {
    p.id: p
    for p in (
        Preset("data_free", "from the weights alone: low rank of W, then the signed scale search"),
        Preset(
            "fast", "the default: learned smoothing, noise-weighted low rank, four shrunk refits",
            tokens=4096, smoothing=SURROGATE, learn=20, weighted_svd=True, refits=4, shrink=0.3,
        ),
        Preset(
            "best", "fast, with longer smoothing and codes by GPTQ on the noise-aware Hessian",
            tokens=8192, smoothing=SURROGATE, learn=60, weighted_svd=True, refits=5, shrink=0.6, gptq=True,
        ),
    )
}  # fmt: skip
DEFAULT = "fast"
OFFERED = ("data_free", "fast", "best")  # what a person chooses from


def preset(id: str) -> Preset:
    """The row named ``id``. Raises ValueError that lists what there is."""
    try:
        return PRESETS[id]
    except KeyError:
        raise ValueError(f"unknown preset {id!r}; there are {', '.join(PRESETS)}") from None
