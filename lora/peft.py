"""PEFT's ``alpha``: it is in adapter_config.json beside the file, or in the file's metadata (diffusers), not in a key.

scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora; alpha_pattern names layers that differ
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..reading import textfile

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_KEY = "lora_adapter_metadata"
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
MAX_BYTES = 1 << 20
LITERAL = re.compile(r"\^?[\w.\\]+\$?")


@dataclass(frozen=True)
class PeftConfig:
    """``alphas``: layer name or its end -> alpha. ``prefix``: only targets below it ("unet."), "" for all. ``rank``:
    the config's own, for updates whose tensors do not show one.
    """

    alpha: float
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    prefix: str = ""
    rank: int = 1

    def of(self, target: str, rank: int) -> float | None:
        """The alpha that gives PEFT's scale at ``alpha / rank``; None for a target that is not this adapter's."""
        if not target.startswith(self.prefix):
            return None
        name = target.removeprefix(self.prefix).removeprefix("base_model.model.")
        hits = (a for end, a in self.alphas.items() if name == end or name.endswith("." + end))
        alpha = next(hits, self.alpha)
        return alpha * rank**0.5 if self.rslora else alpha


def parse(config: Mapping, where: str, prefix: str = "") -> PeftConfig | None:
    """A config's alphas; None when it has none. Raises ValueError for values that are no numbers, and for patterns
    beyond plain layer names (they would be regular expressions from a stranger).
    """
    if "lora_alpha" not in config and "alpha" not in config:
        return None
    pattern = config.get("alpha_pattern") or {}
    try:
        alpha = float(config.get("lora_alpha", config.get("alpha")))
        alphas = {str(k): float(v) for k, v in pattern.items()}
        rank = max(1, int(config.get("r", 1)))
        if not all(map(math.isfinite, (alpha, *alphas.values()))):
            raise ValueError("JSON's NaN or Infinity")
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise ValueError(f"{where}: its alpha and rank are not numbers. Save the adapter again") from e
    odd = next((k for k in alphas if not LITERAL.fullmatch(k)), None)
    if odd is not None:
        raise ValueError(f"{where}: alpha_pattern {odd!r} is not a layer's name. Write plain names into it")
    plain = {k.strip("^$").replace("\\.", "."): a for k, a in alphas.items()}
    return PeftConfig(alpha, plain, bool(config.get("use_rslora", False)), prefix, rank)


def configs(path: str | Path, metadata: Mapping[str, str] | None) -> tuple[PeftConfig, ...]:
    """Every PEFT config that belongs to the LoRA file at ``path``. Raises ValueError for one that cannot be read."""
    path = Path(path)
    beside = path.with_name(CONFIG)
    if path.name == WEIGHTS and beside.is_file():
        found = parse(_json(textfile.read(beside, MAX_BYTES), f"{CONFIG} beside {path.name}"), CONFIG)
        return () if found is None else (found,)
    text = (metadata or {}).get(DIFFUSERS_KEY)
    if not text:
        return ()
    values = _json(text, f"the metadata of {path.name}")
    out = []
    for part in PARTS:
        inner = {k.removeprefix(f"{part}."): v for k, v in values.items() if k.startswith(f"{part}.")}
        config = parse(inner, f"the metadata of {path.name}", f"{part}.")
        if config is not None:
            out.append(config)
    return tuple(out)


def _json(text: str | bytes, where: str) -> dict:
    try:
        values = textfile.value(text)
    except ValueError as e:
        raise ValueError(f"{where} is not JSON. Save the adapter again") from e
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not a JSON object. Save the adapter again")
    return values


def alpha_of(target: str, rank: int, found: tuple[PeftConfig, ...]) -> float | None:
    """The first config's alpha for ``target``, or None."""
    return next((a for c in found if (a := c.of(target, rank)) is not None), None)


def scale_of(target: str, found: tuple[PeftConfig, ...]) -> float:
    """alpha / rank of an update that shows no rank of its own (LoKr of two whole matrices); 1 without a config."""
    return next((a / c.rank for c in found if (a := c.of(target, c.rank)) is not None), 1.0)
