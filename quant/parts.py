"""One linear layer made of several quantized ones, and joining layers that a model keeps apart or together.

    rows      the parts read the same input, their outputs stand one after the other: q, k and v of unlike smooths
    columns   each part reads its share of the input, their outputs are summed: attention and feed-forward of a single
              block of FLUX, of which only the second reads a GELU

    y = join(part_i(x_i)) + (x proj_down) proj_up^T + bias       the branch is what LoRAs add; its rank may be 0

`join` makes one plain weight instead wherever that changes no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import awq, core_low_rank, nvfp4_lowrank, svdquant, weight_only
from .awq import AWQWeight
from .core_low_rank import CoreLowRankWeight
from .nvfp4_lowrank import NVFP4LowRankWeight
from .schemes import GROUP
from .svdquant import SVDQuantWeight
from .weight_only import WeightOnly

Plain = SVDQuantWeight | AWQWeight | NVFP4LowRankWeight | WeightOnly
ROWS, COLUMNS = "rows", "columns"


@dataclass(frozen=True)
class Parts:
    """See the file header. Raises ValueError when the parts do not belong together."""

    parts: tuple[Plain, ...]
    axis: str
    proj_down: Tensor | None = None
    proj_up: Tensor | None = None

    def __post_init__(self):
        across = 1 if self.axis == ROWS else 0
        sizes = {p.shape[across] for p in self.parts}
        if self.axis not in (ROWS, COLUMNS) or len(sizes) != 1:
            raise ValueError(f"parts of shapes {[p.shape for p in self.parts]} cannot be joined along {self.axis!r}")
        n, k = self.shape
        if self.proj_down is not None:
            got = (tuple(self.proj_down.shape), tuple(self.proj_up.shape))
            if got != ((k, self.rank), (n, self.rank)):
                raise ValueError(f"a branch of shapes {got} does not fit N={n}, K={k}")

    @property
    def shape(self) -> tuple[int, int]:
        n, k = (sum(p.shape[i] for p in self.parts) for i in (0, 1))
        return (n, self.parts[0].shape[1]) if self.axis == ROWS else (self.parts[0].shape[0], k)

    @property
    def rank(self) -> int:
        return 0 if self.proj_down is None else self.proj_down.shape[1]

    def to(self, dtype: torch.dtype) -> Parts:
        branch = {}
        if self.proj_down is not None:
            branch = dict(proj_down=self.proj_down.to(dtype), proj_up=self.proj_up.to(dtype))
        return replace(self, parts=tuple(p.to(dtype) for p in self.parts), **branch)


DENSE = {
    AWQWeight: awq.dequantize,
    CoreLowRankWeight: core_low_rank.dequantize,
    NVFP4LowRankWeight: nvfp4_lowrank.dequantize,
    WeightOnly: weight_only.dequantize,
}


def dequantize(w: Plain | Parts | CoreLowRankWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The effective dense weight of any plain weight, (N, K), branch included. For ``dtype`` other than float32 it is
    made in the least memory, a few of its own rounding errors off.
    """
    if isinstance(w, SVDQuantWeight):
        return svdquant.dequantize(w, dtype)
    if not isinstance(w, Parts):
        return DENSE[type(w)](w).to(dtype)
    dense = torch.cat([dequantize(p, dtype) for p in w.parts], 0 if w.axis == ROWS else 1)
    return dense if w.proj_down is None else dense + w.proj_up.to(dtype) @ w.proj_down.to(dtype).t()


def shift(w: Plain | Parts) -> Tensor | None:
    """(N,) float32 that a dense forward must add to the stored bias of layers with unsigned activations, or None."""
    if not isinstance(w, Parts):
        unsigned = getattr(w, "act_unsigned", False)
        return svdquant.SHIFT * svdquant.residual(w).sum(1) if unsigned else None
    found = [shift(p) for p in w.parts]
    if all(s is None for s in found):
        return None
    like = next(s for s in found if s is not None)
    full = [like.new_zeros(p.shape[0]) if s is None else s for s, p in zip(found, w.parts, strict=True)]
    return torch.cat(full) if w.axis == ROWS else sum(full)


def take_rows(w: Plain | Parts | CoreLowRankWeight, start: int, stop: int) -> Plain | CoreLowRankWeight:
    """Rows [start, stop) of any plain weight; what belongs to all of them is shared. Raises ValueError for parts, which
    are joined last, and for rows that are not there.
    """
    if isinstance(w, Parts):
        raise ValueError("rows of a layer that is made of parts")
    if not 0 <= start < stop <= w.shape[0]:
        raise ValueError(f"rows {start} to {stop} of a weight with {w.shape[0]}")
    if isinstance(w, NVFP4LowRankWeight):
        return nvfp4_lowrank.rows(w, start, stop)
    if isinstance(w, WeightOnly):
        return weight_only.rows(w, start, stop)
    if isinstance(w, CoreLowRankWeight):
        return core_low_rank.rows(w, start, stop)
    cut = dict(qweight=w.qweight[start:stop].contiguous(), wscales=w.wscales[:, start:stop].contiguous())
    if isinstance(w, AWQWeight):
        cut["wzeros"] = w.wzeros[:, start:stop].contiguous()
    if w.proj_up is not None:
        cut["proj_up"] = w.proj_up[start:stop].contiguous()
    return replace(w, **cut)


def crop(w: Plain, n: int, k: int) -> Plain:
    """The first N rows and K columns: what an exporter padded to its tile size. Only svdquant_w4a4 is padded."""
    if w.shape == (n, k):
        return w
    if not isinstance(w, SVDQuantWeight) or n > w.shape[0] or k > w.shape[1] or k % GROUP:
        raise ValueError(f"a stored weight of {w.shape} cannot be cut to {(n, k)}")
    w = take_rows(w, 0, n)
    codes = dict(qweight=w.qweight[:, : k // 2].contiguous(), wscales=w.wscales[: k // GROUP].contiguous())
    sides = {n: getattr(w, n)[:k].contiguous() for n in ("smooth_factor", "proj_down")}
    return replace(w, **codes, **sides)


def join(parts: Sequence[Plain], axis: str) -> Plain | Parts:
    """``parts`` as one layer along ``axis``: a plain weight where that is exact, else `Parts`."""
    parts = tuple(parts)
    if len(parts) == 1:
        return parts[0]
    kinds = {type(p) for p in parts}
    one = _JOIN.get((kinds.pop(), axis)) if len(kinds) == 1 else None
    joined = one(parts) if one else None
    return Parts(parts, axis) if joined is None else joined


def _alike(parts: Sequence, *names: str) -> bool:
    return all(torch.equal(getattr(p, n), getattr(parts[0], n)) for p in parts[1:] for n in names)


def _branches_by_row(parts: Sequence) -> dict[str, Tensor]:
    """One branch for rows that read the same input: shared factors stay shared, others stand side by side."""
    if all(p.proj_down.shape == parts[0].proj_down.shape for p in parts) and _alike(parts, "proj_down"):
        return dict(proj_down=parts[0].proj_down, proj_up=torch.cat([p.proj_up for p in parts]))
    up = torch.block_diag(*(p.proj_up for p in parts))
    return dict(proj_down=torch.cat([p.proj_down for p in parts], 1), proj_up=up)


def _svdquant_rows(parts: tuple[SVDQuantWeight, ...]) -> SVDQuantWeight | None:
    if len({p.act_unsigned for p in parts}) > 1 or not _alike(parts, "smooth_factor"):
        return None
    codes = dict(qweight=torch.cat([p.qweight for p in parts]), wscales=torch.cat([p.wscales for p in parts], 1))
    return replace(parts[0], **codes, **_branches_by_row(parts))


def _svdquant_columns(parts: tuple[SVDQuantWeight, ...]) -> SVDQuantWeight | None:
    if len({p.act_unsigned for p in parts}) > 1:
        return None
    return replace(
        parts[0],
        qweight=torch.cat([p.qweight for p in parts], 1),
        wscales=torch.cat([p.wscales for p in parts]),
        smooth_factor=torch.cat([p.smooth_factor for p in parts]),
        proj_down=torch.block_diag(*(p.proj_down for p in parts)),
        proj_up=torch.cat([p.proj_up for p in parts], 1),
    )


def _awq_rows(parts: tuple[AWQWeight, ...]) -> AWQWeight | None:
    if any(p.proj_down is not None for p in parts):
        return None
    sides = {n: torch.cat([getattr(p, n) for p in parts], 1) for n in ("wscales", "wzeros")}
    return replace(parts[0], qweight=torch.cat([p.qweight for p in parts]), **sides)


def _nvfp4_rows(parts: tuple[NVFP4LowRankWeight, ...]) -> NVFP4LowRankWeight | None:
    if not _alike(parts, "smooth_factor"):
        return None
    scales = torch.cat([p.block_scale.view(torch.uint8) for p in parts]).view(torch.float8_e4m3fn)
    cut = {n: torch.cat([getattr(p, n) for p in parts]) for n in ("qweight", "channel_scale")}
    return replace(parts[0], **cut, block_scale=scales, **_branches_by_row(parts))


_JOIN = {
    (SVDQuantWeight, ROWS): _svdquant_rows,
    (SVDQuantWeight, COLUMNS): _svdquant_columns,
    (AWQWeight, ROWS): _awq_rows,
    (NVFP4LowRankWeight, ROWS): _nvfp4_rows,
    (WeightOnly, ROWS): weight_only.stack,
}
