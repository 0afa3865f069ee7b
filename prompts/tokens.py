"""How many CLIP tokens a prompt takes, without CLIP: exact for common English, never fewer than there are.

CLIP splits a text into words and merges each word's bytes pair by pair, lowest rank first. ``clip_merges.txt`` holds
the first merges of its vocabulary. A merge only ever makes pairs of a higher rank, so CLIP itself passes through the
state where the merges of this file are used up, and goes on merging: its count is at most ours. Words with other than
ASCII letters count a token a byte, which nothing can exceed.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

MERGES = Path(__file__).with_name("clip_merges.txt")
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")
BLANK = re.compile(r"[ \t\n\r\x0b\x0c]+")
ENDS = 2  # the start and the end mark
MAX_WORD = 64  # longer ones count a token a letter


def clip_bound(text: str) -> int:
    """CLIP tokens of ``text`` with both end marks, or a few more; one window holds 77."""
    words = BLANK.split(unicodedata.normalize("NFC", text).lower())
    return ENDS + sum(_chunk(word) for word in words if word)


def _chunk(chunk: str) -> int:
    if not chunk.isascii():
        return len(chunk.encode("utf-8", "replace"))
    return sum(_word(w) if len(w) <= MAX_WORD else len(w) for w in WORD.findall(chunk))


@lru_cache(maxsize=20_000)
def _word(word: str) -> int:
    ranks = _ranks()
    symbols = [*word[:-1], word[-1] + "</w>"]
    while len(symbols) > 1:
        rank, pair = min((ranks.get(p, len(ranks)), p) for p in itertools.pairwise(symbols))
        if rank == len(ranks):
            break
        merged, i = [], 0
        while i < len(symbols):
            step = 2 if tuple(symbols[i : i + 2]) == pair else 1
            merged.append("".join(symbols[i : i + step]))
            i += step
        symbols = merged
    return len(symbols)


@lru_cache(maxsize=1)
def _ranks() -> dict[tuple[str, str], int]:
    """(left, right) -> rank; the file's first line says where it is from."""
    lines = MERGES.read_text(encoding="utf-8").split("\n")[1:]
    pairs = (tuple(line.split(" ")) for line in lines if line)
    return {pair: rank for rank, pair in enumerate(pairs)}
