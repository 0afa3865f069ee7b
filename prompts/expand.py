"""Expands a domain: seed and subject in, prompts out. No code is run and no text is read twice.

Slots are filled in the domain's order, each once and from a draw of its own (`draw`), so a slot that is added, taken
away or overridden leaves the others as they were. The person's words go in as they are, whatever they contain.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from ..families import VARIANTS
from ..families.spec import MAX_TOKENS
from ..reading import textfile
from . import draw, tokens
from . import text as texts
from .reader import DomainError
from .spec import AUTO, STYLES, SUBJECT, TAGS, TRIGGER, Choice, Domain, Lora, Part, Slot, When

MAX_SUBJECT, MAX_PROMPT, MAX_OVERRIDES = 2000, 8000, 40
Chosen = dict[str, "Choice | None"]


@dataclass(frozen=True)
class Prompt:
    """A resolved prompt and all that it takes to make it again. ``chosen``: slot -> name of its choice, "" if empty."""

    domain: str
    hash: str
    style: str
    seed: int
    subject: str
    positive: str
    negative: str
    chosen: dict[str, str]
    overrides: dict[str, str]
    trigger: str = ""

    @property
    def tokens(self) -> int:
        """CLIP tokens of the positive prompt, never fewer than there are."""
        return tokens.clip_bound(self.positive)

    @property
    def over(self) -> str:
        """A sentence when the prompt may not fit its encoder's window, else nothing."""
        limit = MAX_TOKENS[self.style]
        if self.tokens <= limit:
            return ""
        return f"up to {self.tokens} tokens, more than the {limit} of one window: what comes last may count less"

    def to_json(self, indent: int | None = 1) -> str:
        return json.dumps(asdict(self) | {"tokens": self.tokens}, indent=indent, ensure_ascii=False)


def expand(domain: Domain, subject: str, seed: int = 0, style: str = AUTO) -> str:
    """The positive prompt alone."""
    return resolve(domain, subject, seed, style).positive


def resolve(domain: Domain, subject: str, seed: int = 0, style: str = AUTO,
            overrides: Mapping[str, str] | None = None, trigger: str = "") -> Prompt:  # fmt: skip
    """The prompt for ``subject`` and ``seed``.

    ``overrides``: slot -> the name of one of its choices, any other text (put in as it is), or "" for nothing.
    ``trigger``: words that a LoRA needs. Raises DomainError for an unknown slot or a text over a cap.
    """
    given = overrides_of(domain, overrides or {})
    prompt = render(domain, choose(domain, seed, given), subject, seed, style, trigger)
    return replace(prompt, overrides={name: choice.name if choice else "" for name, choice in given.items()})


def choose(domain: Domain, seed: int, overrides: Mapping[str, Choice | None]) -> Chosen:
    """What every slot becomes; None where it is empty."""
    chosen: Chosen = {}
    for name in domain.order:
        if name in overrides:
            chosen[name] = overrides[name]
        else:
            slot, options = domain.slots[name], options_of(domain.slots[name], chosen)
            drawn = slot.chance == 100 or draw.below(100, seed, f"{name}/chance") < slot.chance
            chosen[name] = (
                draw.weighted(options, [c.weight for c in options], seed, name) if options and drawn else None
            )
    return chosen


def options_of(slot: Slot, chosen: Chosen) -> list[Choice]:
    """The choices that ``slot`` has, given what the slots before it became."""
    return [c for c in slot.choices if holds(c.when, chosen)] if holds(slot.when, chosen) else []


def holds(when: When, chosen: Chosen) -> bool:
    return all(chosen[c.slot] is not None and chosen[c.slot].name in c.names for c in when)


def render(domain: Domain, chosen: Chosen, subject: str, seed: int, style: str = AUTO, trigger: str = "") -> Prompt:
    """The prompt with the slots as ``chosen``. Raises DomainError for an empty or overlong subject."""
    style = domain.style_for(style)
    words = typed(subject, "the subject")
    if not words:
        raise DomainError("the subject is empty; say what the picture shows")
    values = {SUBJECT: words, TRIGGER: typed(trigger, "the trigger words")}
    try:
        for name in domain.order:
            choice = chosen[name]
            values[name] = texts.fill(choice.texts[style], values, MAX_PROMPT) if choice else ""
        positive, negative = (
            _joined(domain.texts[style][side], values, chosen, style) for side in ("positive", "negative")
        )
    except ValueError as e:
        raise DomainError(f"{domain.id}, {style}: {e}; use a shorter subject") from None
    if words not in positive:
        raise DomainError(f"{domain.id}, {style}: a part with the subject was left out; its slots must not be empty")
    if values[TRIGGER] and not _says(domain, style, TRIGGER):
        positive = f"{positive.rstrip('.')}, {values[TRIGGER]}"
    names = {name: choice.name if choice else "" for name, choice in chosen.items()}
    return Prompt(domain.id, domain.hash, style, seed, words, positive, negative, names, {}, values[TRIGGER])


def _joined(parts: tuple[Part, ...], values: dict[str, str], chosen: Chosen, style: str) -> str:
    """Tags with commas between them; prose with spaces, but none before a comma, full stop or colon."""
    kept = [p.pieces for p in parts if holds(p.when, chosen) and all(values[m] for m in texts.marks(p.pieces))]
    out = ""
    for text in (texts.fill(pieces, values, MAX_PROMPT) for pieces in kept):
        gap = ", " if style == TAGS else ("" if text[:1] in (",", ".", ";", ":") else " ")
        out += gap + text if out else text
        if len(out) > MAX_PROMPT:
            raise ValueError(f"the prompt grows past {MAX_PROMPT} characters")
    return out


def _says(domain: Domain, style: str, mark: str) -> bool:
    return any(mark in texts.marks(part.pieces) for part in domain.texts[style]["positive"])


def overrides_of(domain: Domain, given: Mapping[str, str]) -> dict[str, Choice | None]:
    """slot -> the choice that a person's words mean; None for an empty text. Raises DomainError for an unknown slot."""
    if len(given) > MAX_OVERRIDES:
        raise DomainError(f"{len(given)} overrides; at most {MAX_OVERRIDES} are allowed")
    out: dict[str, Choice | None] = {}
    for name, value in given.items():
        if name not in domain.slots:
            there = ", ".join(domain.slots) or "none"
            raise DomainError(f"{domain.id} has no slot {name[:40]!r}; its slots are {there}")
        words = typed(value, f"the override of {name!r}")
        choices = {c.name: c for c in domain.slots[name].choices}
        if words not in choices and name in holders(domain):
            there = ", ".join(choices)
            raise DomainError(f"{domain.id}: slot {name!r} holds the subject; set it to one of {there}")
        if not words and name in always(domain):
            raise DomainError(f"{domain.id}: slot {name!r} is part of other texts and cannot be empty; give it a text")
        own = Choice(words, dict.fromkeys(STYLES, (words,))) if words else None
        out[name] = choices.get(words, own)
    return out


def holders(domain: Domain) -> set[str]:
    """The slots whose texts hold the subject."""
    return {
        slot.name for slot in domain.slots.values() for choice in slot.choices
        if any(SUBJECT in texts.marks(choice.texts[style]) for style in STYLES)
    }  # fmt: skip


def always(domain: Domain) -> set[str]:
    """The slots that nobody may leave empty: texts of other slots name them, or the subject would go with them."""
    choices = [c.texts[style] for slot in domain.slots.values() for c in slot.choices for style in STYLES]
    parts = [part.pieces for style in STYLES for part in domain.texts[style]["positive"]]
    with_subject = {SUBJECT, *holders(domain)}
    beside = [pieces for pieces in parts if with_subject & {*texts.marks(pieces)}]
    return {mark for pieces in choices + beside for mark in texts.marks(pieces)} | with_subject


def typed(value: str, what: str) -> str:
    """What a person typed, cleaned. Raises DomainError when it is too long."""
    if len(value) > MAX_SUBJECT:
        raise DomainError(f"{what} has {len(value)} characters; at most {MAX_SUBJECT} are allowed")
    return texts.clean(value)


def parse_overrides(lines: str) -> dict[str, str]:
    """``slot: choice`` lines, as a person types them; empty lines and lines that start with # do not count."""
    if len(lines) > MAX_SUBJECT * 4:
        raise DomainError(f"the overrides have {len(lines)} characters; at most {MAX_SUBJECT * 4} are allowed")
    out: dict[str, str] = {}
    for number, line in textfile.numbered(lines):
        name, colon, value = (part.strip() for part in line.partition(":"))
        if not name or name.startswith("#"):
            continue
        if not colon:
            raise DomainError(f"overrides, line {number}: {line[:60]!r} is not 'slot: choice'")
        if name in out:
            raise DomainError(f"overrides, line {number}: slot {name[:40]!r} is there twice")
        out[name] = value
    return out


def loras(domain: Domain, family: str, chosen: Mapping[str, str]) -> list[Lora]:
    """The domain's LoRAs for ``family`` that suit what was ``chosen`` (`Prompt.chosen`)."""
    families = (family, VARIANTS[family].loras_of) if family in VARIANTS else ()
    return [
        lora for lora in domain.loras
        if lora.family in families and all(chosen.get(c.slot, "") in c.names for c in lora.when)
    ]  # fmt: skip


def combinations(domain: Domain, overrides: Mapping[str, str] | None = None) -> Iterator[Chosen]:
    """Every way to fill the slots, in a fixed order."""
    given = overrides_of(domain, overrides or {})

    def rest(names: tuple[str, ...], chosen: Chosen) -> Iterator[Chosen]:
        if not names:
            yield dict(chosen)
            return
        name, slot = names[0], domain.slots[names[0]]
        options: list[Choice | None] = [given[name]] if name in given else list(options_of(slot, chosen))
        if name not in given and (slot.chance < 100 or not options):
            options.append(None)
        yield from itertools.chain.from_iterable(rest(names[1:], {**chosen, name: o}) for o in options)

    return rest(domain.order, {})
