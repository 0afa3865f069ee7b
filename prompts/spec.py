"""What a domain is, after `schema` has checked its file. Data only; nothing in it is ever executed.

One domain holds the same scene in two styles: ``prose`` for encoders that read sentences (T5, Qwen, Llama: Flux, SD3,
Qwen-Image ...) and ``tags`` for CLIP alone (SD1.5, SDXL), whose window is 77 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..families import SIDES, VARIANTS
from ..families.spec import PROSE, TAGS
from .reader import DomainError
from .text import Pieces

AUTO = "auto"
STYLES = (PROSE, TAGS)
SUBJECT, TRIGGER = "subject", "trigger"
GIVEN = (SUBJECT, TRIGGER)  # marks that are no slots: the person's words, and those that a LoRA needs


@dataclass(frozen=True)
class Condition:
    """True when ``slot`` came out as one of ``names``."""

    slot: str
    names: tuple[str, ...]


When = tuple[Condition, ...]  # all must hold


@dataclass(frozen=True)
class Choice:
    """One thing a slot may become: ``texts`` by style; drawn ``weight`` times as often as a weight of 1."""

    name: str
    texts: Mapping[str, Pieces]
    weight: int = 1
    when: When = ()


@dataclass(frozen=True)
class Slot:
    """A slot is filled in ``chance`` percent of the draws and only ``when`` its conditions hold; else it is empty."""

    name: str
    choices: tuple[Choice, ...]
    chance: int = 100
    when: When = ()


@dataclass(frozen=True)
class Part:
    """A piece of a prompt, left out when a slot in it is empty or a condition does not hold."""

    pieces: Pieces
    when: When = ()


@dataclass(frozen=True)
class Lora:
    """A LoRA that suits the domain. ``file``: its name in models/loras; ``link``: where it is, for who lacks it."""

    file: str
    family: str
    link: str
    strength: float = 1.0
    trigger: str = ""
    when: When = ()


@dataclass(frozen=True)
class Domain:
    """A checked domain file.

    ``texts``: style -> {"positive", "negative"} -> parts. ``order``: the slots, each after those that it looks at.
    ``presets``: family -> few-step preset. ``resolution``: family -> (width, height). ``hash``: of everything it says,
    not of how the file is written.
    """

    id: str
    title: str
    description: str
    style: str
    example: str
    texts: Mapping[str, Mapping[str, tuple[Part, ...]]]
    slots: Mapping[str, Slot]
    order: tuple[str, ...]
    loras: tuple[Lora, ...]
    presets: Mapping[str, str]
    resolution: Mapping[str, tuple[int, int]]
    calibration: tuple[str, ...]
    based_on: str
    hash: str

    @property
    def name(self) -> str:
        return self.id.partition("@")[0]

    @property
    def version(self) -> int:
        return int(self.id.partition("@")[2])

    def style_for(self, wanted: str) -> str:
        """prose or tags; `AUTO` is what the domain was written for first."""
        if wanted not in (AUTO, *STYLES):
            raise DomainError(f"style {wanted[:40]!r} is none of {AUTO}, {PROSE}, {TAGS}")
        return self.style if wanted == AUTO else wanted

    def size(self, family: str) -> tuple[int, int]:
        """(width, height) in pixels of a picture by a model of ``family``."""
        known = family
        while known and known not in self.resolution:
            known = VARIANTS[known].sized_like if known in VARIANTS else ""
        side = SIDES.get(family, 1024)
        return self.resolution[known] if known else (side, side)
