"""Matches a LoRA file's keys with a MODEL and a CLIP, and says what became of each key.

ComfyUI's own key map comes first, so what its loaders understand is applied exactly as they would. Names that it does
not know (PEFT folders, diffusers' UNet names, plain BFL names, fused q/k/v on split layers ...) are found by this
pack's names. Fused and swapped rows are put right before (lora/rows.py): ComfyUI's own way of swapping halves forgets
DoRA's magnitudes, rotations and whole weights. The patches themselves are always made by ComfyUI's own adapter classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from comfy.model_patcher import get_key_weight
from torch import Tensor

from ... import families
from ...families.spec import KeyRule
from ...lora import peft
from ...lora.keys import comfyui_suffix, parse
from ...lora.names import MODEL, TEXT, Index, Place, index, place
from ...lora.read import Update, sort
from ...lora.report import KeyReport, describe
from ...lora.rows import Region, divide
from ...lora.status import Refused
from ...lora.weights import inner
from ...quant import kernels
from . import patches as p

TARGET = "t"  # the only target in the small files that ComfyUI's adapters are made from


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
        """ComfyUI's patcher of a part, or None."""
        return self.model if name == MODEL else getattr(self.clip, "patcher", None)


def vocabulary(model, clip) -> Vocabulary:
    """The names of ``model`` and ``clip``, either of which may be None."""
    own: dict[str, dict] = {MODEL: {}, TEXT: {}}
    layers: Index = {}
    if model is not None:
        own[MODEL] = comfy.lora.model_lora_keys_unet(model.model, {})
        layers = index(shapes_of(model.model.diffusion_model, dimensions=1), rules_of(model))
    if clip is not None:
        own[TEXT] = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    near = {}
    for part, names in own.items():
        spots = ((place(name), target) for name, target in names.items())
        near[part] = {(s.ordinal, s.name): target for s, target in spots}
    return Vocabulary(model, clip, own, near, layers)


def shapes_of(module, suffix: str = "", dimensions: int = 2) -> dict[str, tuple[int, ...]]:
    """Layer (+ ``suffix``) -> the logical shape of its weight, of every layer with a matrix or a kernel; with
    ``dimensions`` 1 of the norms too.
    """
    found = ((n, getattr(m, "weight", None)) for n, m in module.named_modules())
    return {f"{n}{suffix}": tuple(w.shape) for n, w in found if isinstance(w, Tensor) and w.dim() >= dimensions}


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


@dataclass(frozen=True)
class Goal:
    """A weight in ComfyUI's model that an update changes. ``inside``: only some of it, ComfyUI's offset (axis, start,
    number). ``source``, ``swap``: as in lora/names.py's Slot.
    """

    key: str
    inside: tuple[int, int, int] | None = None
    source: tuple[int, int] | None = None
    swap: bool = False

    @property
    def target(self):
        """As ComfyUI's patches are keyed."""
        return self.key if self.inside is None else (self.key, self.inside)

    def bias(self) -> Goal:
        """The bias beside this weight. Raises Refused where there can be none."""
        layer, dot, last = self.key.rpartition(".")
        if last != "weight" or (self.inside is not None and self.inside[0] != 0):
            raise Refused("unknown", "the layer has no bias")
        return replace(self, key=f"{layer}{dot}bias")


def _goal(target) -> Goal:
    """ComfyUI's target: a key, or (key, offset [, function])."""
    if isinstance(target, str):
        return Goal(target)
    key, offset, function = (*target, None)[:3]
    if function not in (None, comfy.utils.swap_scale_shift):
        raise Refused("rows", "ComfyUI maps it in a way that this pack does not know")
    return Goal(key, offset, swap=function is not None)


@dataclass
class Match:
    """One LoRA file against one vocabulary. ``status``, ``why``: of the file's keys, as in a KeyReport. ``patches``:
    part -> list of {target: patch}, later ones add to earlier. ``sources``: (part, target) -> the keys its patches are
    made of.
    """

    vocabulary: Vocabulary
    status: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    patches: dict[str, list[dict]] = field(default_factory=lambda: {MODEL: [], TEXT: []})
    sources: dict[tuple[str, object], set[str]] = field(default_factory=dict)

    def place(self, target: str) -> tuple[Place, list[Goal]]:
        """(where ``target`` belongs, the weights it changes)."""
        v = self.vocabulary
        for part in (MODEL, TEXT):
            if target in v.own[part]:
                return Place(part, target), [_goal(v.own[part][target])]
        spot = place(target)
        if spot.part == MODEL and spot.name in v.layers:
            return spot, [
                Goal(f"diffusion_model.{s.layer}.weight", None if s.into is None else (0, *s.into), s.source, s.swap)
                for s in v.layers[spot.name]
            ]
        near = v.near[spot.part].get((spot.ordinal, spot.name))
        return spot, [] if near is None else [_goal(near)]

    def add(self, update: Update, keys: Iterable[str]) -> None:
        """Makes the patches of one update and notes what became of its keys."""
        try:
            spot, goals = self.place(update.target)
            owner = self.vocabulary.part(spot.part)
            if owner is None or not goals:
                raise Refused("other part" if owner is None else "unknown")
            made = _patches(update, goals, owner)
        except Refused as e:
            return self.refuse(keys, e)
        keys = list(keys)
        self._keep(spot.part, made, keys)
        return self.done(keys, spot.part)

    def refuse(self, keys: Iterable[str], e: Refused) -> None:
        for key in keys:
            if key not in self.status:
                self.status[key] = e.status
                self.why |= {key: e.why} if e.why else {}

    def done(self, keys: Iterable[str], part: str) -> None:
        """A key that one kind or spelling used is applied, whatever became of it in another."""
        for key in keys:
            self.status[key] = "model" if part == MODEL else "text"
            self.why.pop(key, None)

    def leave_to_comfyui(self, left: Mapping[str, Tensor], renamed: Mapping[str, str]) -> None:
        """Keys of no kind that this pack reads: a newer ComfyUI's loader may know them."""
        for part in (MODEL, TEXT):
            names, owner, watched = dict(self.vocabulary.own[part]), self.vocabulary.part(part), _Watched(left)
            loaded = comfy.lora.load_lora(watched, names, log_missing=False) if left and names else {}
            if loaded and all(_fits(owner, target, value) for target, value in loaded.items()):
                keys = [renamed[k] for k in watched.seen if k in renamed]
                self._keep(part, [loaded], keys)
                self.done(keys, part)

    def patch(self, part: str, owner, strength: float) -> None:
        """Adds the patches of ``part`` to ``owner``, and notes which of them ComfyUI did not take."""
        for some in self.patches[part]:
            taken = set(owner.add_patches(some, strength))
            for target in [t for t in some if t not in taken]:
                del some[target]
                name = target if isinstance(target, str) else target[0]
                for key in self.sources.get((part, target), ()):
                    self.status[key], self.why[key] = "dropped", f"{name} is not in the model's state dict"

    def _keep(self, part: str, made: list[dict], keys: Iterable[str]) -> None:
        """Two spellings of one layer in a file both count, so a target that is taken goes into the next dict."""
        keys = list(keys)
        for patch in made:
            for target, value in patch.items():
                self.sources.setdefault((part, target), set()).update(keys)
                free = next((d for d in self.patches[part] if target not in d), None)
                if free is None:
                    self.patches[part].append(free := {})
                free[target] = value


def _patches(update: Update, goals: list[Goal], owner) -> list[dict]:
    """[{ComfyUI's target: patch}], one for each of ``goals``. Raises Refused where ComfyUI cannot apply one exactly."""
    if update.kind == "bias":
        goals = [goal.bias() for goal in goals]
    if update.kind == "oft" and "rescale" in update.parts:
        raise Refused("unread", "OFT with a rescale, which ComfyUI leaves out")
    regions = [_region(goal, owner) for goal in goals]
    made = []
    for goal, piece in zip(goals, divide(update, regions, lambda i: _dense(goals[i], owner)), strict=True):
        patch = _patch(piece)
        if patch is None or not _fits(owner, goal.target, patch):
            raise Refused("shape")
        made.append({goal.target: patch})
    return made


def _region(goal: Goal, owner) -> Region:
    """What ``goal`` is to `divide`. Raises Refused when the model has no such weight."""
    weight = _weight(owner, goal.key)
    if weight is None:
        raise Refused("unknown", "the layer has no bias" if goal.key.endswith(".bias") else "")
    if weight.dim() == 0:
        raise Refused("shape", "the layer is a single number")
    shape = list(weight.shape)
    if goal.inside is not None:
        shape[goal.inside[0]] = goal.inside[2]
    return Region(tuple(shape), goal.source, goal.swap, goal.inside is not None)


def _weight(owner, key: str):
    """The unpatched tensor at ``key``, also while a clone's LoRA is loaded into the model they share; None for none."""
    try:
        weight = owner.backup[key].weight if key in owner.backup else comfy.utils.get_attr(owner.model, key)
    except AttributeError:
        return None
    return weight if isinstance(weight, Tensor) else None


def _dense(goal: Goal, owner) -> Tensor:
    """What ``goal`` names of a weight, in float32, as ComfyUI's patches see it."""
    weight, (_, _, convert) = _weight(owner, goal.key), get_key_weight(owner.model, goal.key)
    if kernels.is_ours(weight):
        weight = p.dense(weight)
    else:
        weight = weight.to(torch.float32)
        weight = weight if convert is None else convert(weight)
    return weight if goal.inside is None else weight.narrow(*goal.inside)


def _patch(piece: Update):
    """ComfyUI's patch of one update for one weight, made by its own loader."""
    parts = dict(piece.parts)
    if "lokr_t2" in parts:  # torch.kron fails on what ComfyUI makes of a core
        parts = {"dora_scale": parts["dora_scale"]} if "dora_scale" in parts else {}
        parts |= inner(piece.weights).multiplied()
    small = {f"{TARGET}{comfyui_suffix(role)}": t for role, t in parts.items()}
    if piece.kind == "boft":  # ComfyUI fails without one
        small.setdefault(f"{TARGET}.alpha", torch.tensor(0.0))
    loaded = comfy.lora.load_lora(small, {TARGET: "layer.weight"}, log_missing=False)
    return loaded.get("layer.bias" if piece.kind == "bias" else "layer.weight")


def _fits(owner, target, value) -> bool:
    key, offset = (target, None) if isinstance(target, str) else target[:2]
    weight = _weight(owner, key)
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


def match(tensors: Mapping[str, Tensor], configs: tuple[peft.PeftConfig, ...], names: Vocabulary) -> Match:
    """Every key of a LoRA file against ``names``; each gets exactly one status."""
    own = {key: t.detach() for key, t in tensors.items()}  # one object a key, by which renamed keys are known again
    origin = {id(t): key for key, t in own.items()}
    converted = _converted(own)
    renamed = {key: origin[id(t)] for key, t in converted.items() if id(t) in origin}
    out = Match(names)
    file = sort(converted, configs)
    for update in file.updates:
        out.add(update, [renamed[key] for key in update.keys.values() if key in renamed])
    out.leave_to_comfyui({k: converted[k] for k in file.refused if parse(k) is None}, renamed)
    for key, e in file.refused.items():
        out.refuse([renamed[key]] if key in renamed else [], e)
    out.status = {key: out.status[key] for key in tensors}
    return out


def _converted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` in the names that ComfyUI's loaders make of them."""
    half = "img_in.lora_A.weight" in tensors and "img_in.lora_B.weight" not in tensors
    return tensors if half else comfy.lora_convert.convert_lora(dict(tensors))  # it fails on half a control LoRA


def report(file: str, tensors: Mapping[str, Tensor], found: Match, notes: tuple[str, ...] = ()) -> KeyReport:
    family, kinds, ranks = describe({k: tuple(t.shape) for k, t in tensors.items()})
    return KeyReport(file, family, kinds, ranks, found.status, notes, found.why)
