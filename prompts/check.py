"""Tries a domain out: how many different prompts it gives, how long they get, and what looks wrong."""

from __future__ import annotations

from dataclasses import dataclass

from ..families.spec import MAX_TOKENS
from . import batch, tokens
from . import text as texts
from .spec import STYLES, Domain

FEW_SUBJECTS = 20


@dataclass(frozen=True)
class Check:
    """``unique``, ``longest``: by style, of ``samples`` prompts; lengths in CLIP tokens, never too few."""

    id: str
    samples: int
    unique: dict[str, int]
    longest: dict[str, int]
    problems: tuple[str, ...]

    def line(self) -> str:
        """One line of a table."""
        lengths = ", ".join(f"{s} {self.unique[s]} different, up to {self.longest[s]} tokens" for s in STYLES)
        return f"{self.id}: {lengths}" + "".join(f"\n  problem: {p}" for p in self.problems)


def check(domain: Domain, count: int = 1000, seed: int = 0) -> Check:
    """Samples ``count`` prompts of each style, with the longest trigger words that a LoRA of the domain has."""
    unique, longest, problems = {}, {}, []
    for style in STYLES:
        subjects = domain.calibration or (domain.example,)
        prompts = list(batch.samples(domain, subjects, count, seed, style))
        extra = max((tokens.clip_bound(f", {lora.trigger}") for lora in domain.loras), default=2) - 2
        unique[style] = len({p.positive for p in prompts})
        longest[style] = max(p.tokens for p in prompts) + extra
        negative = max(tokens.clip_bound(p.negative) for p in prompts)
        for what, length in (("positive", longest[style]), ("negative", negative)):
            if length > MAX_TOKENS[style]:
                problems.append(f"{style}.{what}: up to {length} tokens, more than {MAX_TOKENS[style]}")
    problems += [f"slots.{name}: no text and no condition names it" for name in sorted(_unused(domain))]
    if len(domain.calibration) < FEW_SUBJECTS:
        problems.append(f"calibration: {len(domain.calibration)} subjects; {FEW_SUBJECTS} or more represent a domain")
    return Check(domain.id, count, unique, longest, tuple(problems))


def _unused(domain: Domain) -> set[str]:
    named = {c.slot for lora in domain.loras for c in lora.when}
    for slot in domain.slots.values():
        named |= {c.slot for c in slot.when}
        for choice in slot.choices:
            named |= {c.slot for c in choice.when}
            named |= {m for style in STYLES for m in texts.marks(choice.texts[style])}
    for sides in domain.texts.values():
        for part in (p for parts in sides.values() for p in parts):
            named |= {*texts.marks(part.pieces), *(c.slot for c in part.when)}
    return set(domain.slots) - named
