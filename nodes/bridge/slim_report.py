"""The report of Slim UNet: what each block saves, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...profiling import tables
from ...profiling.work import FUSED
from ...slim.operations import ATTENTIONS, CONVOLUTIONS, Attention, flops
from . import simulate
from . import slim_blocks as places
from .slim_price import Change, Inputs, Plan, Price

HEAD = ("block", "what", "layers", "MFLOPs before", "saved", "of the evaluation", "weights before", "saved", "error")


@dataclass(frozen=True)
class Facts:
    """All that the report is made of."""

    model: object
    plan: Plan
    inputs: Inputs
    price: Price


@dataclass(frozen=True)
class Saving:
    """FLOPs of one evaluation of one picture, and bytes on the device."""

    flops: int
    flops_saved: int
    bytes: int
    bytes_saved: int


def saving(facts: Facts, change: Change) -> Saving:
    """Of one change, from the shapes of its layers: what a FLOP counter would find (tests/comfy/test_slim.py)."""
    parts = [_layer(facts, change, name) for name in change.layers]
    return Saving(*(sum(values) for values in zip(*parts, strict=True)))


def _layer(facts: Facts, change: Change, name: str) -> tuple[int, int, int, int]:
    module, size = places.parent(facts.model, name), facts.price.sizes[name]
    stored = _bytes(module.state_dict().values())
    if change.op in ATTENTIONS:
        op, attention = ATTENTIONS[change.op], Attention(module.heads * module.dim_head, size)
        saved = op.saved(attention, facts.plan.strength)
        return attention.flops, saved, stored, stored if op.frees else 0
    stages = facts.plan.factored[name]
    before = places.shape(module, size).flops
    return before, before - flops(tuple(stages), size), stored, stored - _bytes(stages.parameters())


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def whole(model, inputs: Inputs) -> int:
    """FLOPs of one evaluation of one picture by the model as it came in, in the size that is measured."""
    tokens = inputs.prompts[0][0][0].shape[1]
    return simulate.evaluation(model.model, (1, 0, *inputs.latent.shape[2:]), torch.float16, FUSED, tokens).flops


def report(facts: Facts) -> str:
    """Markdown for a person: a row a block, then each kind, then all together."""
    latent, total = facts.inputs.latent, whole(facts.model, facts.inputs)
    savings = {c: saving(facts, c) for c in facts.plan.changes}
    rows = [_row(c.block, c.op, len(c.layers), [savings[c]], total, facts.price.errors[c,]) for c in facts.plan.changes]
    for group, error in facts.price.errors.items():
        if len(group) > 1:
            kinds = sorted({c.kind for c in group})
            title = "**all**" if len(group) == len(facts.plan.changes) else "all"
            layers = sum(len(c.layers) for c in group)
            rows.append(_row(title, " and ".join(kinds), layers, [savings[c] for c in group], total, error))
    h, w = latent.shape[2:]
    prompts, levels = len(facts.inputs.prompts), facts.inputs.levels
    about = (
        f"Strength {facts.plan.strength:g}. Measured on {prompts} prompt{'s' * (prompts > 1)} and {levels} noise "
        f"level{'s' * (levels > 1)}, latent {w} x {h}; one evaluation of one picture has {total / 1e6:,.0f} MFLOPs."
    )
    why = (
        "Error: how far the model's answer moves, relative to its size, when only this is changed; the last row is "
        "the slimmed model. " + " ".join(f"{op.id}: {op.summary}." for op in _used(facts.plan.changes))
    )
    return "\n".join([about, "", *tables.table(HEAD, rows), "", why])


def _used(changes: tuple[Change, ...]) -> list:
    ops = {**ATTENTIONS, **CONVOLUTIONS}
    return [ops[id] for id in dict.fromkeys(c.op for c in changes)]


def _row(block: str, what: str, layers: int, savings: list[Saving], total: int, error: float) -> tuple:
    t = Saving(*(sum(getattr(s, name) for s in savings) for name in Saving.__dataclass_fields__))
    share = t.flops_saved / t.flops if t.flops else 0.0
    return (
        block, what, layers, f"{t.flops / 1e6:,.1f}", f"{share:.0%}", f"{t.flops_saved / total:.1%}",
        tables.size(t.bytes), tables.size(t.bytes_saved), f"{error:.2%}",
    )  # fmt: skip
