"""Reads a LoRA file in any of the common key layouts (keys.py) into one thing: target -> what it adds (weights.py).

What a target is called is left as the file spells it; `names` finds the model's layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import peft
from .keys import kind_of, split
from .weights import DiffWeights, DoraWeights, LohaWeights, LokrWeights, LoraWeights, Weights


@dataclass(frozen=True)
class LoraFile:
    """``targets``: the file's own name of a layer -> weights; ``unread``: keys of a kind that this reader cannot add
    to a plain module (ComfyUI's nodes can: OFT, GLoRA, biases), or of halves without their other half.
    """

    targets: dict[str, Weights]
    unread: tuple[str, ...] = field(default=())


def group(keys) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """({target: {role: key}}, keys that belong to no LoRA). A second spelling of a role is among the latter."""
    targets: dict[str, dict[str, str]] = {}
    rest = []
    for key in keys:
        hit = split(key)
        if hit is None or hit[1] in targets.get(hit[0], {}):
            rest.append(key)
        else:
            targets.setdefault(hit[0], {})[hit[1]] = key
    return targets, tuple(rest)


def read(tensors: Mapping[str, Tensor], configs: tuple[peft.PeftConfig, ...] = ()) -> LoraFile:
    """Every whole LoRA in ``tensors``. Raises ValueError when halves do not fit each other or hold NaN."""
    grouped, rest = group(tensors)
    targets, unread = {}, list(rest)
    for target, keys in grouped.items():
        parts = {role: tensors[key] for role, key in keys.items()}
        weights, used = build(target, parts, configs)
        if weights is not None:
            bad = [keys[r] for r in used if not finite(parts[r])]
            if bad:
                raise ValueError(f"LoRA layer {target}: {bad[0]} holds NaN or infinity. Train or download it again")
            targets[target] = weights
        unread += [key for role, key in keys.items() if role not in used]
    return LoraFile(targets, tuple(unread))


def read_file(path: str | Path) -> LoraFile:
    """The LoRA at ``path``: a safetensors file, or a PEFT adapter folder. Raises ValueError as `read` does."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    path = Path(path)
    if path.is_dir():
        path = path / peft.WEIGHTS
    with safe_open(path, framework="pt") as f:
        metadata = f.metadata()
    return read(load_file(path), peft.configs(path, metadata))


def finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity (8-bit floats are asked in 32 bits: torch cannot otherwise)."""
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all())


def build(
    target: str, parts: Mapping[str, Tensor], configs: tuple[peft.PeftConfig, ...] = ()
) -> tuple[Weights | None, tuple[str, ...]]:
    """(what ``parts`` add, the roles that were used), or (None, ()) for a kind that has no class here."""
    make = BUILDERS.get(kind_of(parts))
    if make is None or "reshape" in parts:
        return None, ()
    weights, used = make(target, parts, configs)
    if "dora_scale" in parts and weights is not None and not isinstance(weights, DiffWeights):
        return DoraWeights(weights, parts["dora_scale"]), (*used, "dora_scale")
    return weights, used


def rank_of(parts: Mapping[str, Tensor]) -> int | None:
    """The rank that alpha is divided by; None for an update that shows none (LoKr of two whole matrices, a diff)."""
    down = next((parts[r] for r in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if r in parts), None)
    return None if down is None else down.shape[0]


def _alpha(target: str, parts: Mapping[str, Tensor], rank: int, configs) -> tuple[float, tuple[str, ...]]:
    if "alpha" in parts:
        return float(parts["alpha"]), ("alpha",)
    found = peft.alpha_of(target, rank, configs)
    return (float(rank) if found is None else found), ()


def _lora(target, parts, configs):
    down, up, mid = parts["down"], parts["up"], parts.get("mid")
    if down.dim() < 2 or up.dim() < 2:
        return None, ()
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"LoRA layer {target}: down {tuple(down.shape)} and up {tuple(up.shape)} do not share a rank")
    alpha, used = _alpha(target, parts, down.shape[0], configs)
    return LoraWeights(down, up, alpha, mid), ("down", "up", *(("mid",) if mid is not None else ()), *used)


def _loha(target, parts, configs):
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    cores = ("hada_t1", "hada_t2") if {"hada_t1", "hada_t2"} <= set(parts) else ()
    alpha, used = _alpha(target, parts, parts["hada_w1_b"].shape[0], configs)
    tensors = [parts[n] for n in names]
    return LohaWeights(*tensors, alpha, *(parts[n] for n in cores)), (*names, *cores, *used)


def _lokr(target, parts, configs):
    if "lokr_t2" in parts:
        return None, ()
    sides = [(w,) if w in parts else (f"{w}_a", f"{w}_b") for w in ("lokr_w1", "lokr_w2")]
    scale, used = peft.scale_of(target, configs), ("alpha",) if "alpha" in parts else ()
    rank = rank_of(parts)
    if rank is not None:
        alpha, used = _alpha(target, parts, rank, configs)
        scale = alpha / rank
    one, two = (tuple(parts[n] for n in names) for names in sides)
    return LokrWeights(one, two, scale), (*sides[0], *sides[1], *used)


def _diff(target, parts, configs):
    if "diff" not in parts or parts["diff"].dim() < 2:
        return None, ()
    return DiffWeights(parts["diff"]), ("diff",)


BUILDERS = {"lora": _lora, "loha": _loha, "lokr": _lokr, "diff": _diff}
