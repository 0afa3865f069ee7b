"""Applies LoRAs to the linears of a torch module: 4-bit layers grow their low-rank branch, dense ones are added to.

(ComfyUI's models are patched through its own patcher instead: nodes/bridge.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..quant import kernels
from .read import LoraFile, LoraWeights

PREFIXES = ("", "unet.", "transformer.", "diffusion_model.", "base_model.model.", "base_model.model.unet.")
KOHYA = ("lora_unet_", "lora_transformer_")


@dataclass(frozen=True)
class Report:
    """What became of each target of a LoRA file, in the file's own names."""

    applied: tuple[str, ...]
    unknown: tuple[str, ...]
    mismatched: tuple[str, ...]
    unread: tuple[str, ...]

    def summary(self) -> str:
        parts = [f"{len(self.applied)} applied"]
        for count, what in (
            (len(self.unknown), "not in this model"),
            (len(self.mismatched), "of another shape"),
            (len(self.unread), "keys of another kind"),
        ):
            if count:
                parts.append(f"{count} {what}")
        return ", ".join(parts)


def aliases(layers: Iterable[str]) -> dict[str, str]:
    """Every spelling of a LoRA target -> the layer's dotted name."""
    out = {}
    for layer in layers:
        out |= {prefix + layer: layer for prefix in PREFIXES}
        out |= {prefix + layer.replace(".", "_"): layer for prefix in KOHYA}
    return out


def apply(module: nn.Module, lora: LoraFile, strength: float = 1.0) -> Report:
    """Applies ``lora`` to ``module`` in place, each layer by its own kind. Never raises for keys it does not know."""
    layers = {n: m for n, m in module.named_modules() if hasattr(m, "in_features")}
    names = aliases(layers)
    applied, unknown, mismatched = [], [], []
    for target, weights in lora.targets.items():
        name = names.get(target)
        if name is None:
            unknown.append(target)
        elif tuple(layers[name].weight.shape) != weights.shape:
            mismatched.append(target)
        else:
            _add(layers[name], weights, strength)
            applied.append(target)
    return Report(tuple(applied), tuple(unknown), tuple(mismatched), lora.unread)


def _add(layer: nn.Module, weights: LoraWeights, strength: float) -> None:
    down, up = weights.scaled(strength)
    if kernels.is_ours(layer.weight):
        layer.weight = nn.Parameter(kernels.extend(layer.weight, down, up), requires_grad=False)
    else:
        delta = (up @ down.t()).to(layer.weight.dtype).to(layer.weight.device)
        layer.weight = nn.Parameter(layer.weight.detach() + delta, requires_grad=False)
