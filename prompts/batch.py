"""Many prompts at once: samples, all combinations, and the list of unique prompts that a calibration wants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from . import draw
from .expand import Prompt, combinations, render, resolve
from .reader import DomainError
from .spec import AUTO, Domain

MAX_PROMPTS = 4096
TRIES = 20  # draws per wanted prompt before a domain counts as used up
MAX_COMBINATIONS = 100_000  # looked at, alike or not


def samples(domain: Domain, subjects: Sequence[str], count: int, seed: int = 0, style: str = AUTO,
            overrides: Mapping[str, str] | None = None) -> Iterator[Prompt]:  # fmt: skip
    """``count`` prompts: the subjects in turn, in an order that ``seed`` gives, each prompt with a seed of its own."""
    order = draw.shuffled(list(dict.fromkeys(_some(domain, subjects))), seed, "subjects")
    for i in range(count):
        yield resolve(domain, order[i % len(order)], draw.number(seed, f"sample/{i}"), style, overrides)


def unique(domain: Domain, count: int, seed: int = 0, style: str = AUTO, subjects: Sequence[str] = (),
           overrides: Mapping[str, str] | None = None) -> list[Prompt]:  # fmt: skip
    """Up to ``count`` prompts, no two alike; fewer when the domain has no more. ``subjects``: default its own.

    This is what a calibration takes: ``[p.positive for p in unique(domain, 64)]``.
    """
    if not 0 < count <= MAX_PROMPTS:
        raise DomainError(f"{count} prompts wanted; from 1 to {MAX_PROMPTS} are possible")
    found: dict[str, Prompt] = {}
    for prompt in samples(domain, subjects, count * TRIES, seed, style, overrides):
        found.setdefault(prompt.positive, prompt)
        if len(found) == count:
            break
    return list(found.values())


def every(domain: Domain, subjects: Sequence[str], style: str = AUTO, overrides: Mapping[str, str] | None = None,
          limit: int = MAX_PROMPTS) -> list[Prompt]:  # fmt: skip
    """All different prompts. Raises DomainError when they are more than ``limit``, before it is exceeded."""
    found: dict[str, Prompt] = {}
    seen = 0
    for subject in _some(domain, subjects):
        for chosen in combinations(domain, overrides):
            prompt = render(domain, chosen, subject, 0, style)
            found.setdefault(prompt.positive, prompt)
            seen += 1
            if len(found) > limit or seen > MAX_COMBINATIONS:
                raise DomainError(f"{domain.id} has more than {limit} combinations; override some slots")
    return list(found.values())


def _some(domain: Domain, subjects: Sequence[str]) -> Sequence[str]:
    chosen = subjects or domain.calibration
    if not chosen:
        raise DomainError(f"{domain.id} has no calibration subjects; give some")
    return chosen
