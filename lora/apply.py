"""Applies LoRAs to the layers of a torch module: 4-bit layers grow their low-rank branch, dense ones are added to.

(ComfyUI's models are patched through its own patcher instead: nodes/bridge.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..checkpoints.families import KeyRule, by_diffusers_class
from ..quant import awq, kernels, svdquant
from .names import MODEL, TEXT, Slot, index, place
from .read import LoraFile
from .weights import Weights, stays_low_rank


@dataclass(frozen=True)
class Report:
    """What became of each target of a LoRA file, in the file's own names."""

    applied: tuple[str, ...]
    unknown: tuple[str, ...]
    mismatched: tuple[str, ...]
    unread: tuple[str, ...]
    other_part: tuple[str, ...] = ()

    def summary(self) -> str:
        parts = [f"{len(self.applied)} applied"]
        for count, what in (
            (len(self.other_part), "for another part of the pipeline"),
            (len(self.unknown), "not in this model"),
            (len(self.mismatched), "of another shape"),
            (len(self.unread), "keys of another kind"),
        ):
            if count:
                parts.append(f"{count} {what}")
        return ", ".join(parts)


def rules_of(module: nn.Module) -> list[KeyRule]:
    """The other spelling of a diffusers module's layers, from its family; none for a module that no family knows."""
    config = getattr(module, "config", None)
    family = by_diffusers_class(type(module).__name__, config) if hasattr(config, "get") else None
    return [] if family is None or family.key_rules is None else family.key_rules(config)


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Dotted name -> every linear and convolution of ``module``."""
    named = ((n, m, getattr(m, "weight", None)) for n, m in module.named_modules())
    return {n: m for n, m, w in named if isinstance(w, Tensor) and w.dim() >= 2 and not isinstance(m, nn.Embedding)}


def apply(
    module: nn.Module, lora: LoraFile, strength: float = 1.0, part: str = MODEL, rules: Iterable[KeyRule] | None = None
) -> Report:
    """Applies ``lora`` to ``module`` in place, each layer by its own kind. Never raises for keys it does not know.

    ``part``: what ``module`` is, "model" or "text encoder". ``rules``: native <-> diffusers names, by default those of
    the module's family.
    """
    layers = layers_of(module)
    shapes = {n: tuple(m.weight.shape) for n, m in layers.items()}
    names = index(shapes, rules_of(module) if rules is None else rules)
    out: dict[str, list[str]] = {"applied": [], "unknown": [], "mismatched": [], "other_part": []}
    for target, weights in lora.targets.items():
        spot = place(target)
        slots = names.get(spot.name)
        if slots is None:
            out["unknown" if spot.part == part else "other_part"].append(target)
        elif not _fits(weights, slots, shapes):
            out["mismatched"].append(target)
        else:
            if strength != 0:  # a LoRA at 0 must not cost rank, nor change a bit
                for slot in slots:
                    _add(layers[slot.layer], weights, strength, slot)
            out["applied"].append(target)
    return Report(*(tuple(out[k]) for k in ("applied", "unknown", "mismatched")), lora.unread, tuple(out["other_part"]))


def _fits(weights: Weights, slots: tuple[Slot, ...], shapes) -> bool:
    rows = sum(s.own[1] if s.own else s.into[1] if s.into else shapes[s.layer][0] for s in slots)
    shape = shapes[slots[0].layer]
    return weights.shape == (rows, torch.Size(shape[1:]).numel())


def _add(layer: nn.Module, weights: Weights, strength: float, slot: Slot) -> None:
    weight = layer.weight.detach()
    if kernels.is_ours(weight) and stays_low_rank(weights):
        down, up = weights.scaled(strength)
        down, up = down.to(weight.device), placed(up.to(weight.device), slot, weight.shape[0])
        layer.weight = nn.Parameter(kernels.extend(weight, down, up), requires_grad=False)
        return
    dense = weight.float()
    if kernels.is_ours(weight):
        plain = kernels.unwrap(weight)
        is_svd = isinstance(plain, svdquant.SVDQuantWeight)
        dense = svdquant.dequantize(plain) if is_svd else awq.dequantize(plain)
        if is_svd and layer.bias is not None:
            bias = svdquant.dense_bias(plain, layer.bias.detach()).to(layer.bias.dtype)
            layer.bias = nn.Parameter(bias, requires_grad=False)
    new = _patched(dense, weights, strength, slot).to(weight.dtype)
    layer.weight = nn.Parameter(new, requires_grad=False)


def placed(rows: Tensor, slot: Slot, n: int) -> Tensor:
    """The rows of an update that ``slot`` takes, as the ``n`` rows of its layer (zero outside)."""
    if slot.own is not None:
        rows = rows.narrow(0, *slot.own)
    if slot.swap:
        rows = torch.cat(rows.chunk(2)[::-1])
    if slot.into is None:
        return rows
    out = rows.new_zeros(n, *rows.shape[1:])
    out.narrow(0, *slot.into).copy_(rows)
    return out


def _patched(dense: Tensor, weights: Weights, strength: float, slot: Slot) -> Tensor:
    """``dense`` (N, K ...) float32 with ``weights`` in the rows that ``slot`` names."""
    if slot.into is not None:
        rows = dense.narrow(0, *slot.into)
        return torch.cat([
            dense[: slot.into[0]], weights.patched(rows, strength), dense[slot.into[0] + slot.into[1] :]
        ])  # fmt: skip
    if slot.own is None and not slot.swap:
        return weights.patched(dense, strength)
    whole = replace(slot, own=None, into=slot.own) if slot.own else slot
    # The update was made for a taller weight: lay this layer's rows where they belong in it, and take them out again.
    tall = placed(dense, replace(whole, swap=slot.swap), weights.shape[0])
    new = weights.patched(tall, strength)
    return placed(new, Slot(slot.layer, own=slot.own, swap=slot.swap), dense.shape[0])


__all__ = ["MODEL", "TEXT", "Report", "apply", "layers_of", "placed", "rules_of"]
