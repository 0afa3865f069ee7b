"""The order in which slots are filled: each after the slots that its texts and conditions name."""

from __future__ import annotations

from collections.abc import Mapping

from . import text as texts
from .reader import DomainError
from .spec import STYLES, Slot

MAX_DEPTH = 6  # slots that look at slots that look at slots ...


def needs(slot: Slot) -> list[str]:
    """The slots that must be known before ``slot``, each once."""
    found = [c.slot for c in slot.when]
    for choice in slot.choices:
        found += [c.slot for c in choice.when]
        found += [name for style in STYLES for name in texts.marks(choice.texts[style])]
    return list(dict.fromkeys(found))


def ordered(slots: Mapping[str, Slot]) -> tuple[str, ...]:
    """All slots, dependencies first, else as in the file. Raises DomainError naming a circle or a chain too long."""
    depth: dict[str, int] = {}

    def visit(name: str, chain: tuple[str, ...]) -> int:
        if name in chain:
            raise DomainError(f"slots.{name}: goes in a circle: {' -> '.join((*chain, name))}")
        if len(chain) >= MAX_DEPTH:
            raise DomainError(f"slots.{chain[0]}: more than {MAX_DEPTH} slots deep: {' -> '.join((*chain, name))}")
        if name not in depth:
            below = [visit(other, (*chain, name)) for other in needs(slots[name]) if other in slots]
            depth[name] = 1 + max(below, default=0)
        return depth[name]

    for name in slots:
        if visit(name, ()) > MAX_DEPTH:
            raise DomainError(f"slots.{name}: more than {MAX_DEPTH} slots deep")
    return tuple(sorted(slots, key=lambda n: depth[n]))
