"""Expands a domain's template. One pass, left to right: text that is put in is never looked at again.

Each slot draws from its own generator, seeded by (seed, slot), so adding a slot does not reshuffle the others.
"""

from __future__ import annotations

import random

from .domain import MARK, MAX_TEXT, SUBJECT, Domain


def expand(domain: Domain, subject: str, seed: int = 0) -> str:
    """The full prompt for ``subject``, which is inserted as it is. Raises ValueError for an overlong subject."""
    if len(subject) > MAX_TEXT:
        raise ValueError(f"the subject has {len(subject)} characters; at most {MAX_TEXT} are allowed")

    def fill(mark) -> str:
        slot = mark[1]
        return subject if slot == SUBJECT else random.Random(f"{seed}/{slot}").choice(domain.slots[slot])

    return MARK.sub(fill, domain.template)
