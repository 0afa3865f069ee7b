"""Names of files and folders in sentences: any name that a disk allows can be shown, logged and sent as JSON."""

from __future__ import annotations

import re

MAX_SHOWN, MAX_SENTENCE = 120, 2000
# Controls and line ends, which would break the sentence; direction marks, which would reorder it; and lone surrogates,
# which stand for bytes of a name that are not UTF-8 and which no stream can encode.
UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
UNENCODABLE = re.compile("[\ud800-\udfff]")


def shown(name: object, most: int = MAX_SHOWN) -> str:
    """``name`` on one line, what cannot be printed as an escape; beyond ``most`` letters its middle is cut out."""
    text = UNSHOWN.sub(lambda c: c[0].encode("unicode_escape").decode(), str(name))
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def sentence(text: object) -> str:
    """A message on one line, whatever was put into it: white space is one space, the rest is as in `shown`."""
    return shown(" ".join(str(text).split()), MAX_SENTENCE)


def encodable(text: str) -> str:
    """``text`` as every stream, file and network can carry it: lone surrogates, which are no letters, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def place(name: object, line: int | None = None) -> str:
    """Where something is, to begin a sentence with: "mine.csv, line 3"; the line alone for a ``name`` of ""."""
    return ", ".join(part for part in (shown(name), f"line {line}" if line else "") if part)
