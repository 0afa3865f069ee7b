"""Fixes some slots of a domain for good and writes a domain as YAML: how a person's own domain comes to be.

A slot that is fixed disappears: its text moves into the parts and choices that named it, and conditions on it are
settled. What is left is an ordinary domain that gives the same prompts as the old one with those slots overridden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import yaml

from . import text as texts
from .expand import Chosen
from .spec import STYLES, Choice, Condition, Domain, Lora, Part, Slot, When
from .text import Mark, Pieces

Slots = Mapping[str, Slot]


def bake(domain: Domain, fixed: Mapping[str, Choice | None]) -> dict:
    """The data of ``domain`` with the slots in ``fixed`` settled (None: empty), ready to be written as YAML."""
    known: Chosen = {}
    slots: dict[str, Slot] = {}
    for name in domain.order:
        slot = domain.slots[name]
        if name in fixed:
            known[name] = _filled(fixed[name], known)
        else:
            still = _open(slot, slots, known)
            if still is None:
                known[name] = None
            else:
                slots[name] = still
    return _data(domain, slots, known)


def _open(slot: Slot, slots: Slots, known: Chosen) -> Slot | None:
    """``slot`` with what is known put into its choices; without those that cannot come any more; None without any."""
    when = _settled(slot.when, slots, known)
    kept = [(_filled(c, known), _settled(c.when, slots, known)) for c in slot.choices]
    choices = tuple(replace(c, when=w) for c, w in kept if w is not None)
    return None if when is None or not choices else replace(slot, choices=choices, when=when)


def _settled(when: When, slots: Slots, known: Chosen) -> When | None:
    """The conditions still open; None when one can no longer hold."""
    out = []
    for c in when:
        if c.slot in known:
            names = (known[c.slot].name,) if known[c.slot] else ()
        else:
            names = tuple(choice.name for choice in slots[c.slot].choices)
        possible = tuple(n for n in c.names if n in names)
        if not possible:
            return None
        if c.slot not in known:
            out.append(Condition(c.slot, possible))
    return tuple(out)


def _filled(choice: Choice | None, known: Chosen) -> Choice | None:
    return choice and replace(choice, texts={s: _inlined(choice.texts[s], known, s) for s in STYLES})


def _inlined(pieces: Pieces, known: Chosen, style: str) -> Pieces:
    """``pieces`` with the texts of known slots in place of their marks."""
    out: list[str | Mark] = []
    for piece in pieces:
        if isinstance(piece, Mark) and piece.slot in known:
            choice = known[piece.slot]
            out += choice.texts[style] if choice else ()
        else:
            out.append(piece)
    return tuple(out)


def _kept(parts: tuple[Part, ...], slots: Slots, known: Chosen, style: str) -> list:
    out = []
    for part in parts:
        when = _settled(part.when, slots, known)
        lost = any(m in known and known[m] is None for m in texts.marks(part.pieces))
        if when is not None and not lost:
            text = texts.write(_inlined(part.pieces, known, style))
            out.append({"text": text, "when": _when(when)} if when else text)
    return out


def _data(domain: Domain, slots: Slots, known: Chosen) -> dict:
    loras = [(lora, _settled(lora.when, slots, known)) for lora in domain.loras]
    data = {"id": domain.id, "title": domain.title, "description": domain.description, "style": domain.style,
            "example": domain.example}  # fmt: skip
    for style in STYLES:
        data[style] = {side: _kept(parts, slots, known, style) for side, parts in domain.texts[style].items()}
    data["slots"] = {name: _slot(slot) for name, slot in slots.items()}
    data["loras"] = [lora_data(replace(lora, when=when)) for lora, when in loras if when is not None]
    data["presets"] = dict(domain.presets)
    data["resolution"] = {family: list(size) for family, size in domain.resolution.items()}
    data["calibration"] = list(domain.calibration)
    return data


def _slot(slot: Slot) -> dict:
    data: dict = {"choices": [_choice(c) for c in slot.choices]}
    if slot.chance < 100:
        data["chance"] = slot.chance
    return data | ({"when": _when(slot.when)} if slot.when else {})


def _choice(choice: Choice) -> dict:
    written = {s: texts.write(choice.texts[s]) for s in STYLES}
    same = written["prose"] == written["tags"]
    data: dict = {"name": choice.name} | ({"text": written["prose"]} if same else written)
    if choice.weight > 1:
        data["weight"] = choice.weight
    return data | ({"when": _when(choice.when)} if choice.when else {})


def _when(when: When) -> dict:
    return {c.slot: list(c.names) for c in when}


def lora_data(lora: Lora) -> dict:
    """A LoRA as its YAML entry."""
    data = {"file": lora.file, "family": lora.family, "link": lora.link, "strength": lora.strength,
            "trigger": lora.trigger, "when": _when(lora.when)}  # fmt: skip
    return {key: value for key, value in data.items() if value not in ("", {})}


def to_yaml(data: dict) -> str:
    """``data`` as a domain file."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)
