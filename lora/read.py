"""Reads a LoRA file in any of the common key layouts (keys.py): what it adds to each target (weights.py).

What a target is called is left as the file spells it; `names` finds the model's layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.header import AGAIN, CheckpointError
from ..checkpoints.header import read as read_header
from . import peft
from .build import build, rank_of
from .keys import KINDS, SETTING, WEIGHTS, kinds_of, parse, unread
from .status import Refused
from .weights import DoraWeights, Weights

# Roles that belong to a target as a whole, and so to each of its spellings.
COMMON = ("alpha", "dora_scale", "magnitude", "reshape")
DORA_KINDS = ("lora", "loha", "lokr", "glora")
# Kinds that ComfyUI multiplies as matrices only -> the tensors that they are made of
FLAT = {"loha": ("hada_w",), "lokr": ("lokr_w",), "glora": ("a1", "a2", "b1", "b2")}
TITLES = {
    "lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "boft": "BOFT", "glora": "GLoRA",
    "diff": "a difference", "set": "a whole weight", "bias": "a bias",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Update:
    """What one target of a file adds, of one kind.

    ``parts``: role -> tensor, alpha always among them where the file or its config has one. ``keys``: role -> the
    file's key.
    """

    target: str
    kind: str
    parts: Mapping[str, Tensor]
    keys: Mapping[str, str]

    @cached_property
    def weights(self) -> Weights:
        return build(self.kind, self.parts)

    @property
    def title(self) -> str:
        return TITLES[self.kind]

    def of(self, kind: str = "", **parts: Tensor) -> Update:
        """The same update in other tensors."""
        return replace(self, kind=kind or self.kind, parts=parts)


@dataclass(frozen=True)
class LoraFile:
    """``updates``: everything that can be applied. ``refused``: every other key -> why not."""

    updates: tuple[Update, ...]
    refused: Mapping[str, Refused] = field(default_factory=dict)

    @property
    def targets(self) -> dict[str, Weights]:
        """The file's own name of a layer -> what it adds to the layer's weight."""
        return {u.target: u.weights for u in self.updates if u.kind != "bias"}


def group(keys: Iterable[str]) -> tuple[list[tuple[str, dict[str, str]]], tuple[str, ...]]:
    """([(target, {role: key})], keys that belong to no kind). A target that the file spells in several ways is there
    once a spelling, each with what they share (alpha); of two keys for one role, the second stands alone.
    """
    targets: dict[str, dict[str, dict[str, str]]] = {}
    again, rest = [], []
    for key in keys:
        hit = parse(key)
        if hit is None:
            rest.append(key)
            continue
        target, role, spelling = hit
        roles = targets.setdefault(target, {}).setdefault(spelling, {})
        if role in roles:
            again.append((target, {role: key}))
        else:
            roles[role] = key
    out = []
    for target, spellings in targets.items():
        shared = spellings.pop("", {})
        common = {role: key for role, key in shared.items() if role in COMMON}
        whole_first = sorted(spellings.values(), key=lambda roles: not {"down", "up"} <= set(roles))
        sets = [{**(common if i else shared), **roles} for i, roles in enumerate(whole_first)] or [shared]
        out += [(target, roles) for roles in sets]
    return out + again, tuple(rest)


def sort(tensors: Mapping[str, Tensor], configs: tuple[peft.PeftConfig, ...] = ()) -> LoraFile:
    """What is in ``tensors``: each key in an update, or refused with its reason. Never raises."""
    groups, rest = group(tensors)
    refused, names = _not_read(rest)
    updates = []
    for target, keys in groups:
        kinds = [] if target in names else kinds_of(keys)
        over = dict(keys)
        for kind, roles in kinds:
            mine = {role: over.pop(role) for role in keys if role in roles}
            try:
                updates += make(target, kind, {r: tensors[k] for r, k in mine.items()}, mine, configs)
            except Refused as e:
                refused |= dict.fromkeys(mine.values(), e.with_traceback(None))  # which would hold the tensors
        if over:
            why = Refused("unread", names[target]) if target in names else _incomplete(over)
            refused = {**dict.fromkeys(over.values(), why), **refused}
    used = {key for u in updates for key in u.keys.values()}
    return LoraFile(tuple(updates), {key: refused[key] for key in tensors if key in refused and key not in used})


def read(tensors: Mapping[str, Tensor], configs: tuple[peft.PeftConfig, ...] = ()) -> LoraFile:
    """`sort`. Raises ValueError when a tensor holds NaN or infinity."""
    file = sort(tensors, configs)
    broken = next((key for key, e in file.refused.items() if e.status == "broken" and not finite(tensors[key])), None)
    if broken is not None:
        raise ValueError(f"LoRA key {broken} holds NaN or infinity. Train or download it again")
    return file


def read_file(path: str | Path) -> LoraFile:
    """The LoRA at ``path``: a safetensors file, or a PEFT adapter folder. Raises ValueError as `read` does, and for a
    file that is not a whole safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if path.is_dir():
        path = path / peft.WEIGHTS
    header = read_header(path)
    configs = peft.configs(path, header.metadata)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(path.name, f"its tensors cannot be read ({str(e).strip()[:120]})", AGAIN) from e
    try:
        return read(tensors, configs)
    except ValueError as e:
        raise ValueError(f"{path.name}: {e}") from e


def finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity (8-bit floats are asked in 32 bits: torch cannot otherwise)."""
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all())


def _not_read(rest: Iterable[str]) -> tuple[dict[str, Refused], dict[str, str]]:
    """(key -> why, target -> name of its kind) for keys that belong to no kind that is read."""
    refused, names = {}, {}
    for key in rest:
        hit = unread(key)
        if key.endswith(SETTING):
            refused[key] = Refused("setting")
        elif hit is not None:
            names[hit[0]] = hit[1]
            refused[key] = Refused("unread", hit[1])
    for key in rest:
        target, _, last = key.rpartition(".")
        whole = WEIGHTS if last in ("weight", "bias") else ""
        refused.setdefault(key, Refused("unread", names.get(target, whole)))
    return refused, names


def _incomplete(over: Mapping[str, str]) -> Refused:
    """Which tensors the ones in ``over`` lack, of the kind that they are nearest to."""
    sets = [need for _, sets in KINDS for need in sets if need & set(over)]
    if not sets and not set(over) <= set(COMMON):
        sets = [{"down", "up"}]
    if not sets:
        return Refused("incomplete", f"only {', '.join(sorted(over))}")
    nearest = min(sets, key=lambda need: (len(need - set(over)), -len(need & set(over))))
    return Refused("incomplete", f"no {', '.join(sorted(nearest - set(over)))}")


def make(
    target: str, kind: str, parts: Mapping[str, Tensor], keys: Mapping[str, str], configs: tuple[peft.PeftConfig, ...]
) -> list[Update]:
    """The update of whole ``parts``, and a second one for the bias of a LoRA that has one. Raises Refused for tensors
    that make no update of their kind.
    """
    odd = next((t.dtype for t in parts.values() if t.is_complex() or t.is_quantized), None)
    if odd is not None:
        raise Refused("unread", f"numbers of type {str(odd).removeprefix('torch.')}")
    if not all(map(finite, parts.values())):
        raise Refused("broken")
    parts = _plain(kind, parts)
    bias = parts.pop("up_b", None)
    if kind == "oft" and parts["oft_blocks"].dim() == 4:
        kind = "boft"
    if "dora_scale" in parts and kind not in DORA_KINDS:
        raise Refused("unread", f"{TITLES[kind]} with DoRA")
    update = Update(target, kind, _scaled(target, kind, parts, configs), keys)
    if _adds_nothing(update):
        raise Refused("empty", "alpha 0")
    if bias is None:
        return [update]
    # The second half's bias: what PEFT scales is the sum of both
    scaled = bias.float() * (float(parts["alpha"]) / rank_of(parts) if "alpha" in parts else 1.0)
    rest = {role: key for role, key in keys.items() if role != "up_b"}
    return [replace(update, keys=rest), Update(target, "bias", {"diff_b": scaled}, {"up_b": keys["up_b"]})]


def _plain(kind: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``parts`` with one role for what trainers name in two ways, and alpha as one number."""
    out = dict(parts)
    if "magnitude" in out:  # PEFT's belong to rows, whatever their shape
        if "dora_scale" in out:
            raise Refused("halves", "DoRA magnitudes twice")
        out["dora_scale"] = out.pop("magnitude").reshape(-1, 1)
    for old, new in (("w_norm", "diff"), ("b_norm", "diff_b")):
        if old in out and new not in out:
            out[new] = out.pop(old)
    if kind in FLAT:  # a convolution's factors, whose kernel stands in their columns
        out = {r: t.flatten(1) if r.startswith(FLAT[kind]) and t.dim() > 2 else t for r, t in out.items()}
    alpha = out.pop("alpha", None)
    if alpha is not None and kind not in ("diff", "set", "bias"):
        if alpha.numel() != 1:
            raise Refused("halves", f"an alpha of {alpha.numel()} numbers")
        out["alpha"] = torch.tensor(float(alpha), dtype=torch.float64)
    return out


def _scaled(target: str, kind: str, parts: dict[str, Tensor], configs) -> dict[str, Tensor]:
    """``parts`` with the alpha that a PEFT config gives them."""
    rank = rank_of(parts)
    if rank is not None and "alpha" not in parts:
        alpha = peft.alpha_of(target, rank, configs)
        if alpha is not None:
            parts["alpha"] = torch.tensor(alpha, dtype=torch.float64)
    if kind == "lokr" and rank is None:  # ComfyUI scales these by nothing, PEFT does
        scale = peft.scale_of(target, configs)
        if scale != 1:
            parts["lokr_w1"] = parts["lokr_w1"].float() * scale
    return parts


def _adds_nothing(update: Update) -> bool:
    """Whether alpha takes everything away. (Building the weights says what is wrong with their shapes first.)"""
    weights = update.weights
    no_scale = getattr(weights, "alpha", None) == 0 or getattr(weights, "scale", None) == 0
    return no_scale and not isinstance(weights, DoraWeights)
