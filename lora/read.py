"""Reads a LoRA file in any of the common key layouts into one thing: target -> (down, up, alpha).

    layout      a key of to_q's down half
    kohya       lora_unet_<path with _>.lora_down.weight          alpha in .alpha
    diffusers   unet.<path>.lora_A.weight | transformer.<path>... | <path>.lora.down.weight
    PEFT        base_model.model.<path>.lora_A.weight             alpha in the folder's adapter_config.json
    ComfyUI     diffusion_model.<path>.lora_down.weight

What a target is called is left as the file spells it; `match` finds the model's layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

# suffix -> role; the longest match wins, so list order does not matter
ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
SUFFIXES = tuple(sorted(ROLES, key=len, reverse=True))


@dataclass(frozen=True)
class LoraWeights:
    """One target's update: strength * alpha / rank * up (N, r) @ down (r, K). ``alpha`` defaults to the rank."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def scaled(self, strength: float) -> tuple[Tensor, Tensor]:
        """(down (K, r), up (N, r)) float32 with the whole factor in ``up``: what `kernels.extend` takes."""
        return self.down.float().t(), self.up.float() * (strength * self.alpha / self.rank)


@dataclass(frozen=True)
class LoraFile:
    """``targets``: the file's own name of a layer -> weights; ``unread``: keys that are no plain linear LoRA."""

    targets: dict[str, LoraWeights]
    unread: tuple[str, ...] = field(default=())


def split(key: str) -> tuple[str, str] | None:
    """(target, role) of a key, or None for one that is no part of a plain LoRA."""
    for suffix in SUFFIXES:
        if key.endswith(suffix):
            return key.removesuffix(suffix), ROLES[suffix]
    return None


def read(tensors: Mapping[str, Tensor]) -> LoraFile:
    """Every complete linear LoRA in ``tensors``. Raises ValueError when a down half does not fit its up half."""
    parts: dict[str, dict[str, Tensor]] = {}
    unread = []
    for key, value in tensors.items():
        hit = split(key)
        if hit is None:
            unread.append(key)
        else:
            parts.setdefault(hit[0], {})[hit[1]] = value
    targets = {}
    for name, p in parts.items():
        if "down" not in p or "up" not in p or p["down"].dim() != 2 or p["up"].dim() != 2:
            unread.append(name)
            continue
        if p["down"].shape[0] != p["up"].shape[1]:
            down, up = tuple(p["down"].shape), tuple(p["up"].shape)
            raise ValueError(f"LoRA layer {name}: down {down} and up {up} do not share a rank")
        alpha = float(p["alpha"]) if "alpha" in p else float(p["down"].shape[0])
        targets[name] = LoraWeights(p["down"], p["up"], alpha)
    return LoraFile(targets, tuple(unread))
