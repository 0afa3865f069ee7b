"""The random choices: one number for each (seed, name), the same on every machine and Python version.

``random.Random`` promises no stream across versions and one shared stream would let a new slot reshuffle the others,
so every draw is a hash of its own: SHA-256 of "seed/name", first 8 bytes, scaled to the range.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def number(seed: int, name: str) -> int:
    """64 bits that depend on nothing but ``seed`` and ``name``."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def below(total: int, seed: int, name: str) -> int:
    """An integer in [0, ``total``)."""
    return number(seed, name) * total >> 64


def weighted(items: Sequence[T], weights: Sequence[int], seed: int, name: str) -> T:
    """One of ``items``, as often as its weight says. Integer weights: no float may tip a choice."""
    left = below(sum(weights), seed, name)
    for item, weight in zip(items, weights, strict=True):
        left -= weight
        if left < 0:
            return item
    raise ValueError(f"{name}: there is nothing to draw from")


def shuffled(items: Sequence[str], seed: int, name: str) -> list[str]:
    """``items`` in an order that depends on the seed only."""
    return sorted(items, key=lambda item: (number(seed, f"{name}/{item}"), item))
