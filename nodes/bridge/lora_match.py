"""Matches a LoRA file's keys with a MODEL and a CLIP, and says what became of each key.

ComfyUI's own key map comes first, so what its loaders understand is applied exactly as they would. Names that it does
not know (PEFT folders, diffusers' UNet names, plain BFL names, fused q/k/v on split layers ...) are found by this
pack's names. The patches themselves are always made by ComfyUI's own adapter classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from torch import Tensor

from ...checkpoints import families
from ...checkpoints.families import KeyRule
from ...lora import peft
from ...lora.keys import comfyui_suffix, kind_of
from ...lora.names import MODEL, TEXT, Index, Place, Slot, index, place
from ...lora.read import finite, group, rank_of
from ...lora.report import KeyReport, describe
from . import patches as p

TARGET = "t"  # the only target in the small files that ComfyUI's adapters are made from
# kind -> the roles whose rows are cut where one fused update belongs to several layers
ROWS = {"lora": ("up",), "loha": ("hada_w1_a", "hada_w2_a"), "diff": ("diff",)}


@dataclass(frozen=True)
class Vocabulary:
    """Every name by which one MODEL's and one CLIP's weights go; ``model`` and ``clip`` are None where not connected.

    ``own``: ComfyUI's names -> its target, a key or (key, offset [, function]). ``near``: the same by canonical name.
    """

    model: object | None
    clip: object | None
    own: Mapping[str, Mapping[str, object]]
    near: Mapping[str, Mapping[tuple[int, str], object]]
    layers: Index

    @property
    def title(self) -> str:
        """What the MODEL is, in words."""
        if self.model is None:
            return "no model"
        family, _ = families.detect(shapes_of(self.model.model.diffusion_model, ".weight"))
        return type(self.model.model).__name__ if family is families.GENERIC else family.title

    def part(self, name: str):
        """What holds the weights of a part, or None."""
        owner = {MODEL: self.model, TEXT: self.clip}[name]
        return None if owner is None else (owner.model if name == MODEL else owner.cond_stage_model)


def vocabulary(model, clip) -> Vocabulary:
    """The names of ``model`` and ``clip``, either of which may be None."""
    own: dict[str, dict] = {MODEL: {}, TEXT: {}}
    layers: Index = {}
    if model is not None:
        own[MODEL] = comfy.lora.model_lora_keys_unet(model.model, {})
        layers = index(shapes_of(model.model.diffusion_model), rules_of(model))
    if clip is not None:
        own[TEXT] = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    near = {}
    for part, names in own.items():
        spots = ((place(name), target) for name, target in names.items())
        near[part] = {(s.ordinal, s.name): target for s, target in spots}
    return Vocabulary(model, clip, own, near, layers)


def shapes_of(module, suffix: str = "") -> dict[str, tuple[int, ...]]:
    """Layer (+ ``suffix``) -> the logical shape of its weight, of every layer with a matrix or a kernel."""
    found = ((n, getattr(m, "weight", None)) for n, m in module.named_modules())
    return {f"{n}{suffix}": tuple(w.shape) for n, w in found if isinstance(w, Tensor) and w.dim() >= 2}


def rules_of(model) -> list[KeyRule]:
    """Native <- diffusers names of a loaded MODEL."""
    config = model.model.model_config.unet_config
    pairs = comfy.utils.unet_to_diffusers(config) if "num_res_blocks" in config else {}
    if pairs:
        return [KeyRule(native, (other,)) for other, native in pairs.items()]
    shapes = shapes_of(model.model.diffusion_model, ".weight")
    family, _ = families.detect(shapes)
    if family.key_rules is None:
        return []
    blocks = [n.split(".")[:2] for n in shapes]
    count = {kind: len({b[1] for b in blocks if b[0] == kind}) for kind in {b[0] for b in blocks}}
    main = count.get("double_blocks", count.get("joint_blocks", 0))
    return family.key_rules({"num_layers": main, "num_single_layers": count.get("single_blocks", 0)})


@dataclass
class Match:
    """One LoRA file against one vocabulary. ``patches``: part -> list of {target: patch}, later ones add to earlier."""

    vocabulary: Vocabulary
    configs: tuple[peft.PeftConfig, ...]
    status: dict[str, str] = field(default_factory=dict)
    patches: dict[str, list[dict]] = field(default_factory=lambda: {MODEL: [], TEXT: []})

    def place(self, target: str) -> tuple[Place, list[tuple[object, tuple[int, int] | None]]]:
        """(where ``target`` belongs, [(ComfyUI's target, rows of the update or None for all)])."""
        v = self.vocabulary
        for part in (MODEL, TEXT):
            if target in v.own[part]:
                return Place(part, target), [(v.own[part][target], None)]
        spot = place(target)
        if spot.part == MODEL and spot.name in v.layers:
            return spot, [(_comfy_target(s), s.own) for s in v.layers[spot.name]]
        near = v.near[spot.part].get((spot.ordinal, spot.name))
        return spot, [] if near is None else [(near, None)]

    def add(self, target: str, parts: dict[str, Tensor], keys: dict[str, str]) -> None:
        """Makes the patches of one target and notes what became of its keys."""
        spot, goals = self.place(target)
        kind = kind_of(parts)
        if not all(map(finite, parts.values())):
            return self._note(keys, "broken")
        if not kind:
            return self._note(keys, "incomplete" if goals else self._unplaced(spot))
        if not goals:
            return self._note(keys, self._unplaced(spot))
        made = [self._patch(goal, kind, parts, target, rows) for goal, rows in goals]
        root = self.vocabulary.part(spot.part)
        if any(m is None for m in made) or not all(_fits(root, t, v) for m in made for t, v in m.items()):
            return self._note(keys, "shape")
        self._keep(spot.part, made)
        return self._note(keys, "model" if spot.part == MODEL else "text")

    def _unplaced(self, spot: Place) -> str:
        return "other part" if self.vocabulary.part(spot.part) is None else "unknown"

    def _note(self, keys: dict[str, str], status: str) -> None:
        self.status.update(dict.fromkeys(keys.values(), status))

    def _keep(self, part: str, made: list[dict]) -> None:
        """Two spellings of one layer in a file both count, so a target that is taken goes into the next dict."""
        for patch in made:
            for target, value in patch.items():
                free = next((d for d in self.patches[part] if target not in d), None)
                if free is None:
                    self.patches[part].append(free := {})
                free[target] = value

    def _patch(self, goal, kind: str, parts: dict[str, Tensor], target: str, rows) -> dict | None:
        """{ComfyUI's target: patch} for one layer; None when the update cannot be cut into rows."""
        if rows is not None:
            if kind not in ROWS:
                return None
            parts = {
                r: t.narrow(0, *rows) if r in (*ROWS[kind], "diff_b", "dora_scale") else t for r, t in parts.items()
            }
        small = {f"{TARGET}{comfyui_suffix(r)}": t for r, t in parts.items()}
        scale = parts.get("dora_scale")
        if scale is not None and scale.dim() == 1:  # PEFT's magnitudes belong to rows
            small[f"{TARGET}.dora_scale"] = scale.reshape(-1, 1)
        rank = rank_of(parts)
        alpha = None if rank is None or "alpha" in parts else peft.alpha_of(target, rank, self.configs)
        if alpha is not None:
            small[f"{TARGET}.alpha"] = torch.tensor(alpha)
        if kind == "lokr" and rank is None:  # ComfyUI scales these by nothing, PEFT does
            small[f"{TARGET}.lokr_w1"] = parts["lokr_w1"] * peft.scale_of(target, self.configs)
        key = goal if isinstance(goal, str) else goal[0]
        loaded = comfy.lora.load_lora(small, {TARGET: key}, log_missing=False)
        if isinstance(goal, str):
            return loaded
        return {(k, *goal[1:]): v for k, v in loaded.items()}  # ComfyUI forgets the offset of a bias


def _comfy_target(slot: Slot):
    key = f"diffusion_model.{slot.layer}.weight"
    if slot.into is not None:
        return key, (0, *slot.into)
    return (key, None, comfy.utils.swap_scale_shift) if slot.swap else key


def _fits(root, target, value) -> bool:
    key, offset = (target, None) if isinstance(target, str) else target[:2]
    try:
        weight = comfy.utils.get_attr(root, key)
    except AttributeError:
        return False
    return weight is not None and p.fits(value, tuple(weight.shape), offset)


class _Watched(dict):
    """Remembers which of its keys were read, for loaders that do not say."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = set()

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        if key not in self:
            return default
        return self[key]


def match(tensors: Mapping[str, Tensor], configs, names: Vocabulary) -> Match:
    """Every key of a LoRA file against ``names``; each gets exactly one status."""
    converted = comfy.lora_convert.convert_lora(tensors)
    origin = {id(t): key for key, t in tensors.items()}
    out = Match(names, configs)
    grouped, rest = group(converted)
    for target, keys in grouped.items():
        parts = {role: converted[key] for role, key in keys.items()}
        mine = {role: origin[id(converted[key])] for role, key in keys.items() if id(converted[key]) in origin}
        out.add(target, parts, mine)
    left = _Watched({key: converted[key] for key in rest})
    for part in (MODEL, TEXT):
        loaded = comfy.lora.load_lora(left, dict(names.own[part]), log_missing=False) if left else {}
        if loaded:
            out._keep(part, [loaded])
            read = [origin[id(converted[k])] for k in left.seen]
            out.status.update(dict.fromkeys(read, "model" if part == MODEL else "text"))
    for key in tensors:
        out.status.setdefault(key, "incomplete")
    out.status = {key: out.status[key] for key in tensors}
    return out


def report(file: str, tensors: Mapping[str, Tensor], found: Match, notes: tuple[str, ...] = ()) -> KeyReport:
    family, kinds, ranks = describe({k: tuple(t.shape) for k, t in tensors.items()})
    return KeyReport(file, family, kinds, ranks, found.status, notes)
