"""Which layer gets which scheme. Families write the rules (families/spec.py); here they are data, and followed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import core_formats
from .schemes import KEEP, SVDQUANT, TARGETS, scheme


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer, and why."""

    scheme: str
    reason: str
    rank: int = 0
    act_unsigned: bool = False
    keeps_columns: bool = False


def plan(shapes: Mapping[str, tuple[int, ...]], rules: Sequence, rank: int) -> dict[str, LayerPlan]:
    """Every 2-D weight's plan by the first of ``rules`` (of a family) that names it. ``shapes``: layer name -> weight
    shape; a layer that no rule names stays as it is.

    The rank is cut to what a small layer can use. Layers whose K the scheme cannot group stay 16-bit, with the reason.
    """
    if rank < 0:
        raise ValueError(f"rank must be 0 or more, got {rank}")
    out = {}
    for name, shape in shapes.items():
        if len(shape) != 2:
            out[name] = LayerPlan(KEEP, f"not a linear layer (weight has {len(shape)} dimensions)")
            continue
        rule = next((r for r in rules if re.search(r.pattern, name)), None)
        if rule is None or rule.scheme == KEEP:
            out[name] = LayerPlan(KEEP, rule.reason if rule else "no rule of the policy names it")
            continue
        row, (n, k) = scheme(rule.scheme), shape
        if not row.fits(n, k):
            out[name] = LayerPlan(KEEP, f"{row.id} does not fit N={n}, K={k}")
            continue
        unsigned, reason = rule.act_unsigned, rule.reason
        if unsigned and _gated(rule, name, shapes):
            unsigned, reason = False, "reads a gated product, not a GELU alone"
        rank_here = min(rank, n, k) if row.low_rank else 0
        out[name] = LayerPlan(row.id, reason, rank_here, unsigned, rule.keeps_columns)
    return out


def _gated(rule, name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the layer before ``name`` has another number of rows than ``name`` has columns."""
    before = shapes.get(re.sub(rule.pattern, rule.after, name)) if rule.after else None
    return before is not None and before[0] != shapes[name][1]


WHOLE_COLUMNS = "int8_tensorwise"  # a byte a weight


def retarget(
    plans: Mapping[str, LayerPlan], shapes: Mapping[str, tuple[int, ...]], target: str
) -> dict[str, LayerPlan]:
    """``plans`` with every 4-bit layer in one of ComfyUI's own formats instead; svdquant_w4a4 leaves them as they are.

    Modulations, which the policy gives to awq_w4a16, stay 16-bit there: 4-bit activations ruin them. A layer whose
    columns ComfyUI reads becomes int8 where the target packs two codes a byte. Raises ValueError for an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; there are {', '.join(TARGETS)}")
    if target == SVDQUANT.id:
        return dict(plans)
    row = core_formats.FORMATS[target]
    out = {}
    for name, p in plans.items():
        if p.scheme == KEEP:
            out[name] = p
        elif p.scheme != SVDQUANT.id and row.act_bits < 8:
            out[name] = LayerPlan(KEEP, f"{p.reason}: {target} has no 16-bit activations")
        elif p.keeps_columns and row.bits < 8:
            whole = core_formats.FORMATS[WHOLE_COLUMNS].fits(*shapes[name])
            out[name] = LayerPlan(WHOLE_COLUMNS if whole else KEEP, f"{p.reason}; ComfyUI reads its columns")
        elif row.fits(*shapes[name]):
            out[name] = LayerPlan(target, p.reason)
        else:
            out[name] = LayerPlan(KEEP, f"{target} does not fit N={shapes[name][0]}, K={shapes[name][1]}")
    return out
