"""Which block gets which operation: by resolution, then as a person says for single blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..reading import textfile
from .operations import ATTENTIONS, CONVOLUTIONS

AS_IT_IS = "as it is"
MAX_LINES = 200
Key = tuple[str, int]  # ComfyUI's name of a block: ("input", 1), ("middle", 0), ("output", 11)


@dataclass(frozen=True)
class UNetBlock:
    """A block: how often it is halved (``level``, 0 at the top), and whether there is something to slim."""

    key: Key
    level: int
    attention: bool
    convolutions: bool

    @property
    def name(self) -> str:
        return f"{self.key[0]} {self.key[1]}"


@dataclass(frozen=True)
class Wish:
    """What a person set. The numbers of levels are counted from the top for attention, from the bottom for
    convolutions, among the levels that have any.
    """

    strength: float
    attention: str = AS_IT_IS
    attention_levels: int = 1
    convolutions: str = AS_IT_IS
    conv_levels: int = 1
    blocks: str = ""


@dataclass(frozen=True)
class Slimming:
    """What becomes of a block: ids of `operations.ATTENTIONS` and `operations.CONVOLUTIONS`, "" for as it is."""

    attention: str = ""
    convolutions: str = ""


def choose(places: Sequence[UNetBlock], wish: Wish) -> dict[Key, Slimming]:
    """Block -> what it gets, without those that stay. Raises ValueError for an unknown word, block or line."""
    if not 0 <= wish.strength < 1:
        raise ValueError(f"strength is {wish.strength:g}; it goes from 0 to below 1")
    for word, table in ((wish.attention, ATTENTIONS), (wish.convolutions, CONVOLUTIONS)):
        if word not in (AS_IT_IS, *table):
            raise ValueError(f"{word[:40]!r} is none of {', '.join((AS_IT_IS, *table))}")
    if wish.strength == 0:
        return {}
    top = sorted({p.level for p in places if p.attention})[: wish.attention_levels]
    low = sorted({p.level for p in places if p.convolutions}, reverse=True)[: wish.conv_levels]
    out = {
        p.key: Slimming(
            wish.attention if p.attention and p.level in top and wish.attention in ATTENTIONS else "",
            wish.convolutions if p.convolutions and p.level in low and wish.convolutions in CONVOLUTIONS else "",
        )
        for p in places
    }
    known = {p.name: p for p in places}
    for name, words in _lines(wish.blocks):
        if name not in known:
            raise ValueError(f"this model has no block {name[:40]!r}; it has {', '.join(known)}")
        out[known[name].key] = _slimming(known[name], words)
    return {key: choice for key, choice in out.items() if choice != Slimming()}


def _slimming(block: UNetBlock, words: list[str]) -> Slimming:
    attention = convolutions = ""
    for word in words:
        if word in ATTENTIONS and block.attention:
            attention = word
        elif word in CONVOLUTIONS and block.convolutions:
            convolutions = word
        elif word in ATTENTIONS or word in CONVOLUTIONS:
            raise ValueError(
                f"{block.name} has nothing for {word!r}: no self-attention or 3x3 convolution of that kind"
            )
        elif word != AS_IT_IS:
            options = (AS_IT_IS, *ATTENTIONS, *CONVOLUTIONS)
            raise ValueError(f"{block.name}: {word[:40]!r} is none of {', '.join(options)}")
    return Slimming(attention, convolutions)


def _lines(text: str) -> list[tuple[str, list[str]]]:
    """``block: word, word`` lines; empty ones and those that start with # do not count."""
    lines = list(textfile.numbered(text))
    if len(lines) > MAX_LINES:
        raise ValueError(f"blocks has {len(lines)} lines; at most {MAX_LINES} are read")
    out = []
    for number, line in lines:
        name, colon, words = (part.strip() for part in line.partition(":"))
        if not name or name.startswith("#"):
            continue
        if not colon:
            raise ValueError(f"blocks, line {number}: {line[:60]!r} is not 'input 1: skip'")
        out.append((" ".join(name.split()), [w.strip() for w in words.split(",") if w.strip()]))
    return out
