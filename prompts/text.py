"""Texts of a domain as pieces: plain text and ``{slot}`` marks, found once, when the file is read.

What is put in for a mark is never looked at again, so nothing that a person types can become a mark. Literal braces
are written ``{{`` and ``}}``. There is no other syntax: no expressions, no attributes, no format codes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
SPACE = re.compile("[ \t\n\r\x0b\x0c\x85\u2028\u2029]+")
# Characters that change what is seen, not what is said: controls, direction overrides and marks, zero-width and tag
# characters, lone surrogates. A table and not unicodedata, whose contents differ between Python versions. The two
# joiners (200C, 200D) stay: Persian and emoji need them.
HIDDEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


@dataclass(frozen=True)
class Mark:
    """The place of a slot in a text."""

    slot: str


Pieces = tuple[str | Mark, ...]


def parse(text: str) -> Pieces:
    """``text`` as pieces. Raises ValueError naming the character where a brace has no partner or no slot name."""
    out: list[str | Mark] = []
    plain, at = "", 0
    for token in TOKEN.finditer(text):
        plain += text[at : token.start()]
        at = token.end()
        if token[0] in ("{{", "}}"):
            plain += token[0][0]
        elif token[1] is not None and NAME.fullmatch(token[1]):
            out += [plain, Mark(token[1])]
            plain = ""
        else:
            what = f"{token[0][:40]!r} at character {token.start() + 1}"
            raise ValueError(f"{what} is not a slot like {{light}}; write {{{{ and }}}} for braces")
    return tuple(piece for piece in (*out, plain + text[at:]) if piece)


def marks(pieces: Pieces) -> tuple[str, ...]:
    """The slots that ``pieces`` name, in order."""
    return tuple(p.slot for p in pieces if isinstance(p, Mark))


def write(pieces: Pieces) -> str:
    """The text that `parse` reads as ``pieces``."""
    return "".join(f"{{{p.slot}}}" if isinstance(p, Mark) else escape(p) for p in pieces)


def escape(text: str) -> str:
    """``text`` with its braces doubled, so that `parse` reads it as plain text."""
    return text.replace("{", "{{").replace("}", "}}")


def fill(pieces: Pieces, values: dict[str, str], limit: int) -> str:
    """``pieces`` with every mark's value. Raises ValueError past ``limit`` characters, before the text is built."""
    parts = [values[p.slot] if isinstance(p, Mark) else p for p in pieces]
    if sum(map(len, parts)) > limit:
        raise ValueError(f"the text grows past {limit} characters")
    return "".join(parts)


def clean(text: str) -> str:
    """What a person typed, on one line, without hidden characters; everything visible stays as it is."""
    return SPACE.sub(" ", HIDDEN.sub("", text)).strip(" ")
