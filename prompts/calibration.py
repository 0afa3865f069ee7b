"""Prompts to calibrate with: a list written for this pack, drawn by seed the same way on every machine."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..reading import textfile
from ..reading.names import place

LIST = Path(__file__).with_name("calibration.txt")
MAX_LINES, MAX_LENGTH, MAX_FILE = 4096, 2000, 2**24


def lines(text: str, name: str = "") -> list[str]:
    """The prompts of a text, one a line; blank lines and repeats are dropped. Raises ValueError over the caps, with
    the ``name`` of its file.
    """
    found: dict[str, None] = {}
    for number, line in textfile.numbered(text):
        if len(line) > MAX_LENGTH:
            what = f"a prompt of {len(line)} characters; at most {MAX_LENGTH} are allowed"
            raise ValueError(f"{place(name, number)}: {what}")
        found[line] = None
        if len(found) > MAX_LINES:
            raise ValueError(f"{place(name, number)}: one prompt more than {MAX_LINES}, the most that are read")
    return list(found)


def read(path: Path) -> list[str]:
    """The prompts of a text file. Raises ValueError when there is none, too."""
    found = lines(textfile.read(path, MAX_FILE), path.name)
    if not found:
        raise ValueError(f"{place(path.name)}: there is no prompt in it")
    return found


def sample(count: int, seed: int, given: list[str] | None = None) -> list[str]:
    """``count`` of ``given`` (default: the shipped list) in an order that ``seed`` fixes; all of them if there are
    fewer.

    Drawn by hash, so a longer list or another Python version does not reshuffle the rest.
    """
    prompts = read(LIST) if given is None else given
    return sorted(prompts, key=lambda p: hashlib.sha256(f"{seed}/{p}".encode()).digest())[:count]
