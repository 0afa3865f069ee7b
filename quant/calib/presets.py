"""Calibration recipes, one row each. A new one is one row; `solve` reads nothing but these fields."""

from __future__ import annotations

from dataclasses import dataclass

NONE, SURROGATE, GRID = "none", "surrogate", "grid"


@dataclass(frozen=True)
class Preset:
    """How a W4A4 layer is solved.

    smoothing     none | surrogate (closed form, no forward) | grid (39 candidates scored by the layer's output)
    learn         Adam steps on the surrogate after its best candidate
    weighted_svd  the branch takes what rounding noise would hurt most, not what is largest
    searched      signed -8 scale search instead of absmax / 7
    refits        rounds of (codes, then branch refitted to what they missed), in the output metric
    alternate     rounds of SVD(W s - Q(...)) until the error stops falling (DeepCompressor's low-rank iterations)
    gptq          codes by error feedback through the Hessian; ``damp`` is its share of the mean diagonal
    shrink        how far Gram matrices are drawn to their diagonal, 0..1: few tokens must not be trusted further
    """

    id: str
    summary: str
    tokens: int = 0
    smoothing: str = NONE
    learn: int = 0
    weighted_svd: bool = False
    searched: bool = True
    low_rank: bool = True
    refits: int = 0
    alternate: int = 0
    gptq: bool = False
    damp: float = 0.01
    shrink: float = 0.0

    def __post_init__(self):
        if self.smoothing not in (NONE, SURROGATE, GRID):
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
        Preset(
            "published", "SVDQuant as published: 39-point smoothing grid, SVD of W s, absmax / 7",
            tokens=4096, smoothing=GRID, searched=False,
        ),
        Preset(
            "published_iterated", "published, with up to 100 low-rank iterations",
            tokens=4096, smoothing=GRID, searched=False, alternate=100,
        ),
        Preset(
            "published_gptq", "published, with low-rank iterations and GPTQ (DeepCompressor's gptq.yaml)",
            tokens=4096, smoothing=GRID, searched=False, alternate=100, gptq=True,
        ),
        Preset("nearest", "round to nearest with absmax / 7, no low rank", searched=False, low_rank=False),
    )
}  # fmt: skip
DEFAULT = "fast"
OFFERED = ("data_free", "fast", "best")  # what a person chooses from; the others are for comparison


def preset(id: str) -> Preset:
    """The row named ``id``. Raises ValueError that lists what there is."""
    try:
        return PRESETS[id]
    except KeyError:
        raise ValueError(f"unknown preset {id!r}; there are {', '.join(PRESETS)}") from None
