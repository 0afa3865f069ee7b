"""Prompts to calibrate with: a list written for this pack, drawn by seed the same way on every machine."""

from __future__ import annotations

import hashlib
from pathlib import Path

LIST = Path(__file__).with_name("calibration.txt")
MAX_LINES, MAX_LENGTH = 4096, 2000


def lines(text: str) -> list[str]:
    """The prompts of a text, one a line; blank lines and repeats are dropped. Raises ValueError over the caps."""
    found = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if len(found) > MAX_LINES:
        raise ValueError(f"{len(found)} prompts are given; at most {MAX_LINES} are read")
    for i, line in enumerate(found):
        if len(line) > MAX_LENGTH:
            raise ValueError(f"prompt {i + 1} has {len(line)} characters; at most {MAX_LENGTH} are allowed")
    return found


def sample(count: int, seed: int, given: list[str] | None = None) -> list[str]:
    """``count`` of ``given`` (default: the shipped list) in an order that ``seed`` fixes; all of them if there are
    fewer.

    Drawn by hash, so a longer list or another Python version does not reshuffle the rest.
    """
    prompts = lines(LIST.read_text(encoding="utf-8")) if given is None else given
    return sorted(prompts, key=lambda p: hashlib.sha256(f"{seed}/{p}".encode()).digest())[:count]
