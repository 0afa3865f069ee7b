"""Applies LoRA files to a MODEL and a CLIP, with a report that accounts for every key."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import comfy.utils

from ...checkpoints import header
from ...lora import peft
from ...lora.names import MODEL, TEXT
from ...lora.report import APPLIED, KeyReport, listed
from . import patches as p
from . import selfcheck
from .build import attribute, with_branches
from .lora_match import Match, Vocabulary, match, report, vocabulary
from .operations import FourBitLinear

AGAIN = "Train or download it again"
OTHER = "Choose a LoRA made for this model, or look at Inspect LoRA (Nibble)"


@dataclass(frozen=True)
class Choice:
    """A LoRA file and how strongly it is wanted. ``name`` is what the user chose, ``path`` where it is now."""

    name: str
    path: str
    strength_model: float = 1.0
    strength_clip: float = 1.0


def apply(choices: Iterable[Choice], model, clip=None):
    """(model, clip, report): clones with every LoRA of ``choices``, the originals untouched.

    The LoRAs are added in the order of their names, so the order they are given in changes nothing, not even rounding.
    Raises ValueError for a file that holds NaN, or of which no key is for what is connected.
    """
    selfcheck.require()
    model = None if model is None else with_branches(model)
    names = vocabulary(model, clip)
    texts = []
    for choice in sorted(choices, key=lambda c: (c.name, c.strength_model, c.strength_clip)):
        found, tensors, metadata = _match(choice, names)
        file = Path(choice.name).name
        _require(report(file, tensors, found), names)
        if model is not None:
            model = _patched(model, found, MODEL, choice.strength_model, metadata)
        if clip is not None:
            clip = _patched(clip, found, TEXT, choice.strength_clip, metadata)
        said = report(file, tensors, found, _notes(found, names, choice))
        _require(said, names)  # once more: now it says what ComfyUI took
        texts.append(said.text())
    return model, clip, "\n\n".join(texts) or "No LoRA was chosen; nothing is changed."


def inspect(name: str, path: str, model=None, clip=None) -> tuple[str, str]:
    """(Markdown, JSON) about a LoRA file: what it is and, for what is connected, what each key would do."""
    selfcheck.require()
    names = vocabulary(model, clip)
    choice = Choice(name, path)
    found, tensors, _ = _match(choice, names)
    for part, owner in ((MODEL, model), (TEXT, clip)):
        if owner is not None:
            _patched(owner, found, part, 1.0, {})  # on a clone, to hear what ComfyUI takes
    notes = _notes(found, names, choice) if model is not None or clip is not None else ("connect a model to match it",)
    said = report(Path(name).name, tensors, found, notes)
    return said.text(), said.to_json()


def _match(choice: Choice, names: Vocabulary) -> tuple[Match, dict, dict]:
    header.read(choice.path)
    tensors, metadata = comfy.utils.load_torch_file(choice.path, safe_load=True, return_metadata=True)
    return match(tensors, peft.configs(choice.path, metadata), names), tensors, metadata or {}


def _patched(owner, found: Match, part: str, strength: float, metadata: dict):
    """A clone of a MODEL or CLIP with the patches of ``found``; at strength 0 a clone that is as before."""
    owner = owner.clone()
    if strength != 0:
        found.patch(part, owner, strength)
    if metadata:
        getattr(owner, "patcher", owner).set_attachments("lora_metadata", metadata)
    return owner


def _require(said: KeyReport, names: Vocabulary) -> None:
    """Raises ValueError when applying would break the model or change nothing."""
    if said.count("broken"):
        what = f"{said.count('broken')} keys hold NaN or infinity"
        raise ValueError(f"{said.file}: {what} ({listed(said.keys('broken'))}). {AGAIN}")
    if said.count(*APPLIED):
        return
    if said.count("other part") == len(said.status):
        parts = [what for what, there in (("MODEL", names.model), ("CLIP", names.clip)) if there is None]
        raise ValueError(f"{said.file}: it {said.family}, and no {' or '.join(parts)} is connected. Connect it")
    first = listed(said.status)
    what = f"none of its {len(said.status)} keys fits: it {said.family}, the model is {names.title} ({said.reasons()})"
    raise ValueError(f"{said.file}: {what}. Its keys: {first}. {OTHER}")


def _notes(found: Match, names: Vocabulary, choice: Choice) -> tuple[str, ...]:
    """What the LoRA does to 4-bit layers, in layers and bytes, and which strengths are 0."""
    out = []
    for strength, part, there in (
        (choice.strength_model, MODEL, names.model),
        (choice.strength_clip, TEXT, names.clip),
    ):
        if strength == 0 and there is not None and found.patches[part]:
            out.append(f"strength 0: the {part} stays as it is")
    return (*out, *(_held(names.model, found, choice.strength_model) if names.model is not None else ()))


def _held(model, found: Match, strength: float) -> tuple[str, ...]:
    """What the LoRA becomes in the quantized layers of ``model``, in layers and bytes, together with the LoRAs that it
    has already.
    """
    grown, dense, rounded, bytes_grown, bytes_dense = 0, 0, 0, 0, 0
    for key, added in _by_layer(found.patches[MODEL]).items():
        layer = attribute(model.model, key.rpartition(".")[0])
        if strength == 0 or not key.endswith(".weight") or not getattr(layer, "layout_type", None):
            continue
        if not isinstance(layer, FourBitLinear):
            rounded += 1
            continue
        before = p.live(model.patches.get(key, ()))
        size = [model.added_bytes(key, layer, some) for some in (before, [*before, *added])]
        if p.rank_of([*before, *added], tuple(layer._orig_shape)) is None:
            dense, bytes_dense = dense + 1, bytes_dense + size[1] - size[0]
        else:
            grown, bytes_grown = grown + 1, bytes_grown + size[1] - size[0]
    out = []
    if grown:
        out.append(f"{grown} quantized layers take it into their low-rank branch: {bytes_grown / 2**20:.1f} MiB more")
    if dense:
        why = "this kind, or one below it, has no low-rank form that is smaller"
        out.append(f"{dense} quantized layers become 16-bit while it is on: {bytes_dense / 2**20:.1f} MiB more ({why})")
    if rounded:
        why = "it is merged into them and rounded again. Load the file with Load 4-bit Model to keep it exact"
        out.append(f"{rounded} quantized layers are not this pack's: {why}")
    return tuple(out)


def _by_layer(patches: list[dict]) -> dict[str, list[tuple]]:
    """Weight key -> ComfyUI's patch tuples at strength 1."""
    out: dict[str, list[tuple]] = {}
    for some in patches:
        for target, value in some.items():
            key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
            out.setdefault(key, []).append((1.0, value, 1.0, offset, function))
    return out
