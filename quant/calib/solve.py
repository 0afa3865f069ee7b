"""Solves one layer: float weight and a sample of its input in, 4-bit weight and its measured error out.

The order is the method (SVDQuant, 2411.05007, with the changes that docs/quantization.md measures):
smooth -> low rank by expected noise -> codes -> branch refitted to what the codes missed -> codes -> ...
The last refit comes after the last codes, so the branch always belongs to the codes that ship.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from .. import awq, core_formats, datafree, scales, svdquant
from ..checks import relative_error
from ..packing import pack
from ..policy import LayerPlan
from ..schemes import AWQ, GROUP, SVDQUANT
from ..svdquant import SHIFT, SVDQuantWeight
from . import gptq, low_rank, smooth
from .presets import SURROGATE, Preset

HELD_BACK = 8  # one token in so many decides between the calibrated and the data-free weight
ONE_SIDED = 4  # a symmetric input that is merely small reaches as far up as down
CLEAR, QUICK = 0.5, 1024  # unsigned steps so much finer, in the square, need no trial; tokens to measure them on


@dataclass(frozen=True)
class Solved:
    """``error``: ||y - y_4bit||^2 / ||y - mean y||^2 on tokens that calibration did not see; ``data_free`` that of the
    data-free weight; ``calibrated`` whether the calibrated one was better and was kept. ``weight`` is a plain tensor
    for a layer that was moved to 16 bits, a QuantizedTensor for one of ComfyUI's own formats.
    """

    weight: SVDQuantWeight | awq.AWQWeight | QuantizedTensor | Tensor
    bias: Tensor | None
    error: float
    data_free: float
    calibrated: bool


@dataclass(frozen=True)
class Sample:
    """A layer's input: ``tokens`` (M, K) float32 on the device that solves; over all tokens that passed, ``maxima``
    (K,) and the ``lowest`` value (None: that of ``tokens``).
    """

    tokens: Tensor
    maxima: Tensor
    lowest: float | None = None

    @cached_property
    def floor(self) -> float:
        """The lowest value that the layer was fed."""
        return float(self.tokens.min()) if self.lowest is None else self.lowest

    @cached_property
    def split(self) -> tuple[Sample, Tensor]:
        """(what calibration sees, what it does not); the order of tokens is random already."""
        held = max(1, len(self.tokens) // HELD_BACK)
        return Sample(self.tokens[held:], self.maxima, self.floor), self.tokens[:held]

    @cached_property
    def gram(self) -> Tensor:
        """X^T X (K, K): made once for all layers that share the input."""
        return self.tokens.t() @ self.tokens


def candidates(plan: LayerPlan, sample: Sample | None, preset: Preset) -> tuple[LayerPlan, ...]:
    """``plan`` as its input allows: with unsigned activations or without, or both where only a trial can say.

    Unsigned codes begin at -`SHIFT`, just below a GELU, and everything lower is lost. So an input that falls below
    makes a layer signed, whatever its family says. One that never does, and reaches up `ONE_SIDED` times as far as
    down, may be unsigned without its family's word: a GELU's output, a ReLU's, a softmax's.
    """
    if plan.scheme != SVDQUANT.id or sample is None or not preset.needs_data or not len(sample.tokens):
        return (plan,)
    signed = replace(plan, act_unsigned=False, reason=f"{plan.reason}; signed: its input begins at {sample.floor:.2f}")
    if sample.floor < -SHIFT:
        return (signed,) if plan.act_unsigned else (plan,)
    ratio = _step_ratio(sample.tokens[:QUICK])
    if plan.act_unsigned:
        return (plan,) if ratio < CLEAR else (plan, signed)
    if ratio >= 1 or float(sample.maxima.max()) < -ONE_SIDED * sample.floor:
        return (plan,)
    return plan, replace(
        plan, act_unsigned=True, reason=f"{plan.reason}; unsigned: its input begins at {sample.floor:.2f}"
    )


def _step_ratio(x: Tensor) -> float:
    """Mean squared step of unsigned codes over that of signed ones, for tokens ``x`` (T, K)."""
    groups = x.unflatten(-1, (-1, GROUP))
    unsigned = (groups.amax(-1) + SHIFT).square().mean() / 15**2
    return float(unsigned / (groups.abs().amax(-1).square().mean() / 7**2).clamp(min=1e-30))


def solve_best(
    weight: Tensor,
    bias: Tensor | None,
    sample: Sample | None,
    plan: LayerPlan,
    preset: Preset,
    dtype: torch.dtype,
    seed: int = 0,
) -> tuple[LayerPlan, Solved]:
    """`solve` by each of the plan's `candidates`: the plan that errs least on held-back tokens, and what it gave."""
    tried = [(p, solve(weight, bias, sample, p, preset, dtype, seed)) for p in candidates(plan, sample, preset)]
    return min(tried, key=lambda t: t[1].error) if len(tried) > 1 else tried[0]


def output_error(x: Tensor, w: Tensor, weight: SVDQuantWeight | awq.AWQWeight) -> float:
    """`checks.relative_error` of the 4-bit layer over tokens ``x`` (T, K)."""
    if isinstance(weight, awq.AWQWeight):
        got = awq.linear(x, weight)
    else:
        got = svdquant.linear(x, weight, svdquant.stored_bias(weight, None))
    return relative_error(got, x @ w.t())


def solve(
    weight: Tensor,
    bias: Tensor | None,
    sample: Sample | None,
    plan: LayerPlan,
    preset: Preset,
    dtype: torch.dtype,
    seed: int = 0,
) -> Solved:
    """The 4-bit form of a layer. ``weight`` (N, K) float32; without a ``sample`` it is data-free."""
    if plan.scheme in core_formats.FORMATS:
        return _core(weight, bias, sample, plan.scheme, dtype)
    free = _data_free(weight, plan, preset, dtype, seed)
    if sample is None or not preset.needs_data or len(sample.tokens) < HELD_BACK:
        return _solved(free, bias, float("nan"), float("nan"), False, dtype)
    seen, held = sample.split
    found = _calibrate(weight, seen, plan, preset, dtype, seed)
    plain = output_error(held, weight, free)
    error = output_error(held, weight, found)
    better = error < plain and all(torch.isfinite(t.float()).all() for t in _sides(found))
    return _solved(found if better else free, bias, min(error, plain) if better else plain, plain, better, dtype)


def _core(weight: Tensor, bias: Tensor | None, sample: Sample | None, id: str, dtype: torch.dtype) -> Solved:
    """A layer in one of ComfyUI's own formats: nothing to calibrate, but its error is measured all the same."""
    q = core_formats.quantize(weight, id, dtype)
    error = float("nan") if sample is None else core_formats.output_error(sample.split[1], weight, q)
    return Solved(q, bias, error, error, False)


def _solved(weight, bias, error: float, data_free: float, calibrated: bool, dtype: torch.dtype) -> Solved:
    if isinstance(weight, SVDQuantWeight):
        stored = svdquant.stored_bias(weight, bias)
        bias = stored if stored is None else stored.to(dtype if bias is None else bias.dtype)
    return Solved(weight, bias, error, data_free, calibrated)


def _sides(weight) -> list[Tensor]:
    names = ("wscales", "wzeros", "smooth_factor", "proj_down", "proj_up")
    return [t for n in names if (t := getattr(weight, n, None)) is not None]


def _data_free(weight: Tensor, plan: LayerPlan, preset: Preset, dtype: torch.dtype, seed: int):
    if plan.scheme == AWQ.id:
        return awq.quantize(weight, dtype)
    rank = plan.rank if preset.low_rank else 0
    table = scales.CANDIDATES if preset.searched or preset.needs_data else scales.NEAREST
    return datafree.quantize(weight, rank, dtype, plan.act_unsigned, seed, table)


def _calibrate(w: Tensor, sample: Sample, plan: LayerPlan, preset: Preset, dtype: torch.dtype, seed: int):
    if plan.scheme == AWQ.id:
        return awq.quantize(w, dtype, sample.tokens.square().mean(0))
    qmax, shift = (15, SHIFT) if plan.act_unsigned else (7, 0.0)
    problem = Problem(w, sample, shift, qmax, plan.rank if preset.low_rank else 0, preset, dtype, seed)
    s = _smooth(problem)
    up, down, s = _first_branch(problem, s)
    s = s.to(dtype).float()  # from here on the rounded factor, as the kernel will divide by it
    q, wscales, up, down = _codes_and_refits(problem, s, up, down)
    up, down = low_rank.balanced(up, down)
    return SVDQuantWeight(
        pack(q), wscales, s.to(dtype), down.to(dtype).contiguous(), up.to(dtype).contiguous(), plan.act_unsigned
    )


@dataclass(frozen=True)
class Problem:
    """What every step below needs: w (N, K), its input, the activation grid, rank, recipe, storage dtype, seed."""

    w: Tensor
    sample: Sample
    shift: float
    qmax: int
    rank: int
    preset: Preset
    dtype: torch.dtype
    seed: int

    @property
    def x(self) -> Tensor:
        return self.sample.tokens

    def rounded(self, s: Tensor) -> Tensor:
        """What the 4-bit product sees of x: (M, K), smoothed, shifted, rounded and back."""
        return scales.rounded((self.x + self.shift) / s, self.qmax)


def _subset(problem: Problem) -> tuple[Tensor, Tensor]:
    """Few tokens and few rows are enough for the surrogate."""
    g = torch.Generator().manual_seed(problem.seed)
    rows = torch.randperm(problem.w.shape[0], generator=g)[: smooth.ROWS].to(problem.w.device)
    return problem.x[: smooth.TOKENS], problem.w[rows]


def _smooth(problem: Problem) -> Tensor:
    p, sample = problem.preset, problem.sample
    if callable(p.smoothing):
        return p.smoothing(problem.w, problem.x, sample.maxima, problem.rank, problem.shift, problem.qmax, problem.seed)
    if p.smoothing != SURROGATE:
        return torch.ones_like(sample.maxima)
    x, w = _subset(problem)
    s = smooth.search(problem.x[: 2 * smooth.TOKENS], problem.w, sample.maxima, problem.shift, problem.qmax)
    return smooth.learn(s, x, w, problem.shift, problem.qmax, p.learn) if p.learn else s


def _first_branch(problem: Problem, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(up, down, s): the branch before any rounding, in the raw-x domain; s once more for what the branch leaves."""
    w, p = problem.w, problem.preset
    if not p.weighted_svd:
        up, down = low_rank.truncated(w * s, problem.rank, problem.seed)
        return up, down / s.unsqueeze(1), s
    q = low_rank.noise_weights(problem.x, s, problem.shift, problem.qmax)
    up, down = low_rank.weighted(w, s, q, problem.rank, problem.seed)
    if p.learn:
        x, _ = _subset(problem)
        g = torch.Generator().manual_seed(problem.seed)
        rows = torch.randperm(w.shape[0], generator=g)[: smooth.ROWS].to(w.device)
        s = smooth.learn(s, x, w[rows] - up[rows] @ down.t(), problem.shift, problem.qmax, max(1, p.learn // 2))
        q = low_rank.noise_weights(problem.x, s, problem.shift, problem.qmax)
        up, down = low_rank.weighted(w, s, q, problem.rank, problem.seed)
    return up, down, s


def _codes_and_refits(problem: Problem, s: Tensor, up: Tensor, down: Tensor):
    """(codes (N, K), wscales (K/64, N), up, down) for the rounded smoothing factor ``s``."""
    p, w = problem.preset, problem.w
    seen = problem.rounded(s)
    importance = seen.square().mean(0)
    table = scales.CANDIDATES if p.searched else scales.NEAREST
    low, high = (-8, 7) if p.searched else (-7, 7)
    factor = gptq.inverse_factor(seen.t() @ seen, p.shrink, p.damp) if p.gptq else None
    if p.iterate:
        up, down = p.iterate(w, s, (up, down), problem.x, problem.seed)
    gram = low_rank.shrunk(problem.sample.gram, p.shrink) if p.refits and problem.rank else None
    for i in range(max(1, p.refits)):
        target = (w - up @ down.t()) * s
        q, wscales = scales.search(target, importance if p.searched else None, problem.dtype, table)
        if factor is not None:
            q = gptq.codes(target, wscales, factor, low, high)
        if gram is not None:
            missed = w - scales.applied(q, wscales) / s
            up, down = low_rank.refit(missed, gram, problem.rank, problem.seed + i)
    return q, wscales, up, down
