"""Spends a byte budget where it lowers the error most: a rank for each layer, or 8 or 16 bits for the stubborn ones.

Every layer offers options (bytes, error). Only those on its lower convex hull are worth anything; starting from the
cheapest, the step with the best error saved per byte over all layers is taken until the budget is spent. For separable
convex costs this greedy is optimal up to the last item (it is the linear programme's vertex).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .. import core_formats
from ..checks import narrowed
from ..policy import LayerPlan
from ..schemes import KEEP, SVDQUANT, scheme
from .presets import PRESETS, Preset
from .solve import HELD_BACK, Sample, Solved, solve, solve_best

RANKS = (16, 32, 64, 128)
FILE_OVERHEAD, LAYER_OVERHEAD, TENSOR_OVERHEAD = 8192, 1536, 256  # header and marks of a file: more than they take
EIGHT_BIT = "int8_tensorwise"
QUICK_TOKENS, QUICK_ROWS = 1024, 1024
PROMOTE_OVER = 0.05  # relative output error above which a layer leaves 4 bits


@dataclass(frozen=True)
class Option:
    """One way to store a layer: its plan, what it takes, and the relative output error it was measured at."""

    plan: LayerPlan
    nbytes: int
    error: float


def measure(weight: torch.Tensor, sample: Sample | None, plan: LayerPlan, preset: Preset, seed: int) -> list[Option]:
    """The options of one layer, measured quickly: few tokens, few rows, one refit. AWQ layers have no cheaper way, and
    those that too few tokens reached have nothing to measure with.
    """
    n, k = weight.shape
    if plan.scheme != SVDQUANT.id or sample is None or len(sample.tokens) < HELD_BACK:
        return [Option(plan, stored_bytes(plan, (n, k)), 0.0)]
    g = torch.Generator().manual_seed(seed)
    some = torch.randperm(n, generator=g)[:QUICK_ROWS].to(weight.device)
    few, quick = (
        Sample(sample.tokens[:QUICK_TOKENS], sample.maxima, sample.floor),
        replace(preset, refits=min(1, preset.refits), gptq=False),
    )
    out = []
    for rank in [r for r in RANKS if r <= min(n, k) // 2] or [min(plan.rank, n, k)]:
        ranked, found = solve_best(weight[some], None, few, replace(plan, rank=rank), quick, torch.bfloat16, seed)
        out.append(Option(ranked, stored_bytes(ranked, (n, k)), found.error))
    if core_formats.FORMATS[EIGHT_BIT].fits(n, k):
        q = core_formats.quantize(weight[some], EIGHT_BIT, torch.bfloat16)
        error = core_formats.output_error(few.split[1], weight[some], q)
        eight = LayerPlan(EIGHT_BIT, "promoted: 4 bits cost too much here")
        out.append(Option(eight, stored_bytes(eight, (n, k)), error))
    out.append(Option(LayerPlan(KEEP, "promoted to 16 bits: nothing smaller was close enough"), 2 * n * k, 0.0))
    return out


def hull(options: list[Option]) -> list[Option]:
    """The options on the lower convex hull of (bytes, error), cheapest first."""
    best: list[Option] = []
    for o in sorted(options, key=lambda o: (o.nbytes, o.error)):
        if best and o.error >= best[-1].error:
            continue
        while len(best) > 1 and _slope(best[-2], o) >= _slope(best[-2], best[-1]):
            best.pop()
        best.append(o)
    return best


def _slope(a: Option, b: Option) -> float:
    """Error saved per byte from ``a`` to ``b``."""
    return (a.error - b.error) / max(1, b.nbytes - a.nbytes)


def fit(
    options: Mapping[str, list[Option]], budget: int, weights: Mapping[str, float] | None = None
) -> dict[str, LayerPlan]:
    """A plan for every layer whose bytes together stay within ``budget`` and whose weighted error is least.

    ``weights``: what a unit of a layer's relative error costs (all alike if not given). Raises ValueError when even the
    cheapest options do not fit, with what they need.
    """
    weights = weights or {}
    hulls = {n: hull(o) for n, o in options.items()}
    at = dict.fromkeys(hulls, 0)
    spent = sum(h[0].nbytes for h in hulls.values())
    if spent > budget:
        least = f"{spent / 2**20:.1f} MiB of the smallest choice for every layer"
        what = f"the budget of {budget / 2**20:.1f} MiB is less than the {least}"
        raise ValueError(f"{what}; raise it, or set it to 0 and lower the rank")
    heap: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        h, i = hulls[name], at[name]
        if i + 1 < len(h):
            heapq.heappush(heap, (-_slope(h[i], h[i + 1]) * weights.get(name, 1.0), name))

    for name in hulls:
        offer(name)
    while heap:
        _, name = heapq.heappop(heap)
        h, i = hulls[name], at[name]
        step = h[i + 1].nbytes - h[i].nbytes
        if spent + step <= budget:
            spent, at[name] = spent + step, i + 1
            offer(name)
    return {n: h[at[n]].plan for n, h in hulls.items()}


def promoted(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sample: Sample,
    plan: LayerPlan,
    solved: Solved,
    over: float,
    dtype: torch.dtype,
) -> tuple[LayerPlan, Solved]:
    """(plan, solved) as given; or in 8 bits, or 16, when the measured error of a W4A4 layer is over ``over``."""
    if plan.scheme != SVDQUANT.id or not solved.error > over:
        return plan, solved
    why = f"promoted: 4 bits err by {solved.error:.3f}"
    n, k = weight.shape
    if core_formats.FORMATS[EIGHT_BIT].fits(n, k):
        eight = solve(weight, bias, sample, LayerPlan(EIGHT_BIT, why), PRESETS["data_free"], dtype)
        if eight.error <= over:
            return LayerPlan(EIGHT_BIT, why), eight
    return LayerPlan(KEEP, why), Solved(narrowed(weight, dtype), bias, 0.0, solved.data_free, False)


def file_overhead(layers: int, tensors: int) -> int:
    """Bytes that a file's header and per-layer marks take at most; ``tensors``: those outside the planned layers."""
    return FILE_OVERHEAD + LAYER_OVERHEAD * layers + TENSOR_OVERHEAD * tensors


def stored_bytes(plan: LayerPlan, shape: tuple[int, int]) -> int:
    """Bytes of a layer's weight under ``plan`` in a file with 16-bit sides."""
    n, k = shape
    if plan.scheme == KEEP:
        return 2 * n * k
    if plan.scheme in core_formats.FORMATS:
        return core_formats.stored_bytes(plan.scheme, n, k)
    return scheme(plan.scheme).bytes(n, k, plan.rank)
