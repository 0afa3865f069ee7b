"""A 4-bit weight and a LoRA beside it whose sum is closest to the float weight. Source: LoftQ, arXiv 2310.08659, alg.
1.

    L_0 = the best rank-R part of W
    C_t = 4-bit codes of W - L_{t-1}          every group of 64 keeps its old codes where new ones would be worse
    L_t = the best rank-(R + r) part of W - C_t                                                            t = 1 ... T

R is the rank of the 4-bit weight's own branch, r that of the LoRA. The R largest directions of L_T become the branch,
the others the LoRA. Both steps can only lower || W - C - L ||; a round that rounding to 16 bits made worse is dropped.
awq_w4a16 has no branch of its own: R = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..quant import awq, datafree, scales
from ..quant.calib.low_rank import balanced
from ..quant.checks import require_finite, require_range
from ..quant.modules import moved
from ..quant.packing import pack
from ..quant.policy import LayerPlan
from ..quant.schemes import AWQ, SVDQUANT
from ..quant.svdquant import SVDQuantWeight
from .recipes import LOFTQ


@dataclass(frozen=True)
class Initialised:
    """A layer's 4-bit ``weight`` and the LoRA ``down`` (r, K), ``up`` (N, r) that belongs to it, alpha = r.

    Errors are ||W - what stands in for it|| / ||W||: ``errors`` after each round, of the sum; ``quantized`` of the
    4-bit weight that data-free quantization makes; ``residual`` of that one and the SVD of what it missed, as a LoRA
    of the same rank.
    """

    weight: SVDQuantWeight | awq.AWQWeight
    down: Tensor
    up: Tensor
    errors: tuple[float, ...]
    quantized: float
    residual: float

    @property
    def error(self) -> float:
        return self.errors[-1]

    def to(self, device: torch.device | str) -> Initialised:
        """All of it on ``device``."""
        weight, down, up = moved(self.weight, device), self.down.to(device), self.up.to(device)
        return replace(self, weight=weight, down=down, up=up)


@dataclass(frozen=True)
class _Codes:
    """One quantization: ``parts`` as the scheme keeps them, ``dense`` (N, K) float32 as they multiply."""

    parts: tuple[Tensor, ...]
    dense: Tensor


def best(weight: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(up (N, r), down (K, r)) float32, rounded to ``dtype``: the best rank-r part of ``weight``, largest first.

    By the eigenvectors of the smaller Gram matrix: quantization noise has a flat spectrum, of which randomised SVD
    finds too little.
    """
    n, k = weight.shape
    r = min(rank, n, k)
    small = weight if n <= k else weight.t()
    _, vectors = torch.linalg.eigh(small @ small.t())
    one = vectors[:, vectors.shape[1] - r :].flip(-1)
    other = small.t() @ one
    up, down = balanced(*((one, other) if n <= k else (other, one)))
    return up.to(dtype).float(), down.to(dtype).float()


def solve(
    weight: Tensor,
    plan: LayerPlan,
    rank: int,
    dtype: torch.dtype,
    iterations: int = LOFTQ.rounds,
    check: Callable[[], None] = lambda: None,
) -> Initialised:
    """LoftQ of one (N, K) ``weight`` in ``plan``'s scheme, with a LoRA of ``rank``; scales and factors in ``dtype``.
    ``check`` is called in each round and may raise to stop it.

    Raises ValueError for weights that are not finite or leave the range of ``dtype``, no round or no rank, and for a
    scheme that is not this pack's.
    """
    if rank < 1 or iterations < 1:
        raise ValueError(f"LoftQ needs a LoRA of rank 1 or more and at least one round, got {rank} and {iterations}")
    if plan.scheme not in _QUANTIZERS:
        raise ValueError(f"LoftQ knows {', '.join(_QUANTIZERS)}; {plan.scheme} is not among them")
    w = weight.float()
    require_finite(w)
    quantize, own = _QUANTIZERS[plan.scheme], plan.rank if plan.scheme == SVDQUANT.id else 0
    norm = w.norm().clamp(min=1e-30)
    up, down = (t.to(dtype).float() for t in datafree.low_rank(w, own))
    first = codes = quantize(w - up @ down.t(), dtype, None)
    require_range((first.dense, up, down), w, dtype)
    missed = w - first.dense - up @ down.t()
    more = best(missed, rank, dtype)
    plain = float(missed.norm() / norm), float((missed - more[0] @ more[1].t()).norm() / norm)
    errors: list[float] = []
    kept = None
    for i in range(iterations):
        check()
        codes = codes if i == 0 else quantize(w - up @ down.t(), dtype, codes)
        up, down = best(w - codes.dense, own + rank, dtype)
        error = float((w - codes.dense - up @ down.t()).norm() / norm)
        if errors and error >= errors[-1]:
            break
        errors.append(error)
        kept = codes, up, down
    return _split(kept, own, plan, dtype, (tuple(errors), *plain))


def working_bytes(n: int, k: int) -> int:
    """An upper bound of what `solve` takes for one (N, K) weight on its device, in bytes.

    Float32: the weight and nine more of its size (target, codes of two rounds, products, what is missed), and six Gram
    matrices for the eigenvectors.
    """
    return 4 * (10 * n * k + 6 * min(n, k) ** 2)


def _split(kept: tuple[_Codes, Tensor, Tensor], own: int, plan: LayerPlan, dtype: torch.dtype, errors: tuple):
    """The first ``own`` directions beside the codes, the others as the LoRA."""
    codes, up, down = kept
    up, down = up.to(dtype), down.to(dtype)
    if plan.scheme == AWQ.id:
        base = awq.AWQWeight(*codes.parts)
    else:
        q, wscales = codes.parts
        smooth = torch.ones(q.shape[1], dtype=dtype, device=q.device)
        branch = down[:, :own].contiguous(), up[:, :own].contiguous()
        base = SVDQuantWeight(pack(q), wscales, smooth, *branch, plan.act_unsigned)
    return Initialised(base, down[:, own:].t().contiguous(), up[:, own:].contiguous(), *errors)


def _svdquant(target: Tensor, dtype: torch.dtype, old: _Codes | None) -> _Codes:
    n, k = target.shape
    q, s = scales.search(target, dtype=dtype)
    dense = (q.float().reshape(n, -1, scales.GROUP) * s.float().t().unsqueeze(-1)).reshape(n, k)
    if old is None:
        return _Codes((q, s), dense)
    worse = _by_group(dense - target) > _by_group(old.dense - target)  # (N, K/64)
    wide = worse.repeat_interleave(scales.GROUP, 1)
    q, s = torch.where(wide, old.parts[0], q), torch.where(worse.t(), old.parts[1], s)
    return _Codes((q, s), torch.where(wide, old.dense, dense))


def _awq(target: Tensor, dtype: torch.dtype, old: _Codes | None) -> _Codes:
    found = awq.quantize(target, dtype)
    new = _Codes((found.qweight, found.wscales, found.wzeros), awq.dequantize(found))
    if old is None:
        return new
    worse = _by_group(new.dense - target) > _by_group(old.dense - target)
    bytes_ = worse.repeat_interleave(awq.GROUP // 2, 1)  # two codes a byte, and groups are even
    parts = [torch.where(bytes_, old.parts[0], new.parts[0])]
    parts += [torch.where(worse.t(), o, s) for o, s in zip(old.parts[1:], new.parts[1:], strict=True)]
    return _Codes(tuple(parts), torch.where(worse.repeat_interleave(awq.GROUP, 1), old.dense, new.dense))


def _by_group(missed: Tensor) -> Tensor:
    """(N, K) -> (N, K/64): the squared error of each group."""
    return missed.square().unflatten(1, (-1, scales.GROUP)).sum(-1)


_QUANTIZERS: dict[str, Callable[[Tensor, torch.dtype, _Codes | None], _Codes]] = {SVDQUANT.id: _svdquant, AWQ.id: _awq}


def table(layers: dict[str, Initialised]) -> str:
    """Markdown: every layer's weight error quantized only, with the SVD of the residual beside it, and by LoftQ."""
    rows = ["| layer | 4 bits | + SVD of the residual | LoftQ | rounds |", "|---|---|---|---|---|"]
    for name, x in layers.items():
        rows.append(f"| {name} | {x.quantized:.4f} | {x.residual:.4f} | {x.error:.4f} | {len(x.errors)} |")
    means = [sum(v) / max(1, len(layers)) for v in zip(*((x.quantized, x.residual, x.error) for x in layers.values()),
                                                       strict=True)]  # fmt: skip
    title = f"{len(layers)} layers, mean weight error {means[0]:.4f} in 4 bits, {means[1]:.4f} with the SVD of the "
    return "\n".join([f"{title}residual, {means[2]:.4f} by LoftQ", "", *rows])
