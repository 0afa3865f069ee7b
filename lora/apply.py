"""Applies LoRAs to the layers of a torch module: 4-bit layers grow their low-rank branch, dense ones are added to.

(ComfyUI's models are patched through its own patcher instead: nodes/bridge.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..families import by_diffusers_class
from ..families.spec import KeyRule
from ..quant import kernels
from .keys import parse, unread
from .names import MODEL, TEXT, Index, Slot, index, place
from .read import LoraFile, Update
from .rows import Region, divide
from .status import APPLIED, STATUSES, Refused
from .weights import Weights, grown, stays_low_rank

WORDS = {**STATUSES, "other part": "for another part of the pipeline"}


@dataclass(frozen=True)
class Report:
    """What became of every key of a LoRA file, each exactly once. ``status``: key -> one of `STATUSES`. ``targets``:
    key -> the layer as the file calls it, the key itself where it names none. ``why``: key -> the reason, in words.
    """

    status: Mapping[str, str]
    targets: Mapping[str, str] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)

    def named(self, *statuses: str) -> tuple[str, ...]:
        """The targets with one of ``statuses``."""
        return tuple(dict.fromkeys(self.targets.get(k, k) for k, s in self.status.items() if s in statuses))

    @property
    def applied(self) -> tuple[str, ...]:
        return self.named(*APPLIED)

    @property
    def whole(self) -> bool:
        """Whether all of the file was applied."""
        return all(s in APPLIED for s in self.status.values())

    @property
    def unknown(self) -> tuple[str, ...]:
        return self.named("unknown")

    @property
    def unread(self) -> tuple[str, ...]:
        """The keys that are left, for reasons that lie in the file."""
        reported = (*APPLIED, "unknown", "shape", "other part")
        return tuple(k for k, s in self.status.items() if s not in reported)

    def summary(self) -> str:
        parts = [f"{len(self.applied)} applied"]
        for status, words in WORDS.items():
            names = () if status in APPLIED else self.named(status)
            if names:
                reasons = sorted({self.why[k] for k, s in self.status.items() if s == status and k in self.why})
                why = f" ({', '.join(reasons)})" if status in ("unread", "rows") and reasons else ""
                parts.append(f"{len(names)} {words}{why}")
        return ", ".join(parts)


def rules_of(module: nn.Module) -> list[KeyRule]:
    """The other spelling of a diffusers module's layers, from its family; none for a module that no family knows."""
    config = getattr(module, "config", None)
    family = by_diffusers_class(type(module).__name__, config) if hasattr(config, "get") else None
    return [] if family is None else family.key_rules(config)


def layers_of(module: nn.Module, dimensions: int = 2) -> dict[str, nn.Module]:
    """Dotted name -> every linear and convolution of ``module``; with ``dimensions`` 1 the norms too."""
    named = ((n, m, getattr(m, "weight", None)) for n, m in module.named_modules())
    found = ((n, m) for n, m, w in named if isinstance(w, Tensor) and w.dim() >= dimensions)
    return {n: m for n, m in found if not isinstance(m, nn.Embedding)}


def apply(
    module: nn.Module, lora: LoraFile, strength: float = 1.0, part: str = MODEL, rules: Iterable[KeyRule] | None = None
) -> Report:
    """Applies ``lora`` to ``module`` in place, each layer by its own kind. Never raises for keys it does not know.

    ``part``: what ``module`` is, "model" or "text encoder". ``rules``: native <-> diffusers names, by default those of
    the module's family.
    """
    layers = layers_of(module, 1)
    names = index({n: tuple(m.weight.shape) for n, m in layers.items()}, rules_of(module) if rules is None else rules)
    refused, done = dict(lora.refused), {}
    for update in lora.updates:
        try:
            slots = _slots(update, names, part)
            pieces = _pieces(update, slots, layers)
        except Refused as e:
            refused |= dict.fromkeys(update.keys.values(), e)
            continue
        if strength != 0:  # a LoRA at 0 must not cost rank, nor change a bit
            for slot, piece in zip(slots, pieces, strict=True):
                _add(layers[slot.layer], piece, strength, slot)
        done |= dict.fromkeys(update.keys.values(), "model" if part == MODEL else "text")
    status = {key: e.status for key, e in refused.items()} | done
    why = {key: e.why for key, e in refused.items() if e.why and key not in done}
    targets = {key: hit[0] for key in status if (hit := parse(key) or unread(key)) is not None}
    return Report(status, targets, why)


def _slots(update: Update, names: Index, part: str) -> tuple[Slot, ...]:
    """The layers that ``update`` changes. Raises Refused when there are none."""
    spot = place(update.target)
    if spot.name not in names:
        raise Refused("unknown" if spot.part == part else "other part")
    if "reshape" in update.parts:
        raise Refused("unread", "a LoRA that makes its layer larger")
    return names[spot.name]


def _pieces(update: Update, slots: tuple[Slot, ...], layers: Mapping[str, nn.Module]) -> list[Update]:
    """What each slot takes of ``update``. Raises Refused where one cannot."""
    regions = [_region(update, slot, layers) for slot in slots]
    return divide(update, regions, lambda i: _rows_of(layers, slots[i]))


def _region(update: Update, slot: Slot, layers: Mapping[str, nn.Module]) -> Region:
    layer = layers[slot.layer]
    shape = tuple(layer.weight.shape)
    if update.kind == "bias":
        if getattr(layer, "bias", None) is None:
            raise Refused("unknown", "the layer has no bias")
        shape = shape[:1]
    if slot.into is not None:
        shape = (slot.into[1], *shape[1:])
    return Region(shape, slot.source, slot.swap, slot.into is not None)


def _rows_of(layers: Mapping[str, nn.Module], slot: Slot) -> Tensor:
    """The rows of a layer's weight that ``slot`` names, in float32."""
    weight = _dense(layers[slot.layer].weight.detach())
    return weight if slot.into is None else weight.narrow(0, *slot.into)


def _dense(weight: Tensor) -> Tensor:
    return kernels.dense(weight) if kernels.is_quantized(weight) else weight.float()


def _add(layer: nn.Module, piece: Update, strength: float, slot: Slot) -> None:
    """Adds what `rows.divide` made for ``slot`` to its layer."""
    if piece.kind == "bias":
        layer.bias = nn.Parameter(_patched(layer.bias.detach(), piece.weights, strength, slot), requires_grad=False)
        return
    weight = layer.weight.detach()
    if kernels.is_quantized(weight) and stays_low_rank(piece.weights):
        down, up = piece.weights.scaled(strength)
        into = Slot(slot.layer, into=slot.into)
        down, up = down.to(weight.device), placed(up.to(weight.device), into, weight.shape[0])
        layer.weight = nn.Parameter(grown(weight, down, up), requires_grad=False)
        return
    shift = kernels.shift(weight)
    if shift is not None and layer.bias is not None:  # a dense weight wants the true bias
        layer.bias = nn.Parameter((layer.bias.detach().float() + shift).to(layer.bias.dtype), requires_grad=False)
    layer.weight = nn.Parameter(_patched(weight, piece.weights, strength, slot), requires_grad=False)


def placed(rows: Tensor, slot: Slot, n: int) -> Tensor:
    """The rows of an update that ``slot`` takes, as the ``n`` rows of its layer (zero outside)."""
    if slot.source is not None:
        rows = rows.narrow(0, *slot.source)
    if slot.swap:
        rows = torch.cat(rows.chunk(2)[::-1])
    if slot.into is None:
        return rows
    out = rows.new_zeros(n, *rows.shape[1:])
    out.narrow(0, *slot.into).copy_(rows)
    return out


def _patched(weight: Tensor, weights: Weights, strength: float, slot: Slot) -> Tensor:
    """``weight`` with ``weights`` in the rows that ``slot`` names, in its own dtype."""
    out = _dense(weight).clone()
    region = out if slot.into is None else out.narrow(0, *slot.into)
    region.copy_(weights.patched(region, strength))
    return out.to(weight.dtype)


__all__ = ["MODEL", "TEXT", "Report", "apply", "layers_of", "placed", "rules_of"]
