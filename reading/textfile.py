r"""Text that people wrote, in a file or a box: its words, or ValueError in one sentence with the file's name and line.

Every caption, prompt list, csv, jsonl, domain and word list is read by these rules.

encoding  A byte order mark decides: UTF-8, UTF-16 or UTF-32. Without one it is UTF-16 where more than half of the
          characters are Latin, by the place of their zero bytes; else UTF-8; else Windows-1252. No byte is replaced or
          left out. Refused: control characters and what Windows-1252 does not define (no text), UTF-8 among other
          bytes (two files put together), and letters in rows that only other code pages have (Cyrillic, Chinese).
lines     \n, \r\n and \r end one, nothing else does. Form feeds, vertical tabs, U+0085, U+2028 and U+2029 are spaces,
          and byte order marks further on are nothing. A line is stripped; an empty one does not count, but for numbers.
csv       Python's csv, comma and double quotes, strict; the first row names the columns, in any case. A line break in
          quotes belongs to the text. Empty rows do not count; a row of more fields than names is refused.
jsonl     One JSON value a line.
caption   One line: all white space is one space. At most 10,000 characters.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from .names import place

MAX_CAPTION, MAX_CAPTION_FILE = 10_000, 2**20
MAX_COMMAS = 100_000  # in a line of csv
MARKS = (  # UTF-32 before UTF-16: the one's little-endian mark begins with the other's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
SPACES = "\x0b\x0c\x85\u2028\u2029"  # str.splitlines() ends a line at these, too
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")  # JSON can spell lone surrogates
# What Windows-1252 would turn into letters that nobody wrote, or into nothing.
UNKNOWN = re.compile(
    rb"[\x81\x8d\x8f\x90\x9d]"  # not defined
    rb"|[\xc2\xc3][\x80-\xbf]|\xe2[\x80-\x84][\x80-\xbf]"  # UTF-8 of accented letters, quotes and dashes
    rb"|[\xc0-\xff]{3}"  # another code page: three accented letters in a row, or two where four are not ASCII
    rb"|(?=[\x80-\xff]{4})[\x80-\xbf]*[\xc0-\xff][\x80-\xbf]*[\xc0-\xff]"
)
REMEDY = "Save the file as UTF-8"


def read(path: Path, most: int) -> str:
    """The text of a file of at most ``most`` bytes; every line ends with a newline character."""
    name = place(path.name)
    if not path.is_file():
        raise ValueError(f"{name}: there is no such file")
    try:
        with path.open("rb") as f:
            data = f.read(min(path.stat().st_size, most) + 1)  # as much memory is taken as is asked for
    except OSError as e:
        raise ValueError(f"{name}: it cannot be read ({e.strerror or type(e).__name__})") from e
    if len(data) > most:
        size = f"{most // 2**20} MiB" if most >= 2**20 else f"{most // 2**10} KiB"
        raise ValueError(f"{name}: larger than {size}, the most that is read")
    return decoded(data, path.name)


def decoded(data: bytes, name: str) -> str:
    """The text of ``data``, the content of the file ``name``."""
    for mark, encoding in MARKS:
        if data.startswith(mark):
            text = _strict(data[len(mark) :], encoding, name)
            break
    else:
        text = _unmarked(data, name)
    if found := CONTROL.search(text):
        at = place(name, _line(text[: found.start()]))
        raise ValueError(f"{at}: this is no text, it has the control character U+{ord(found[0]):04X}. {REMEDY} text")
    return plain(text)


def _strict(data: bytes, encoding: str, name: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as e:
        at = place(name, _line(data[: e.start].decode(encoding, "ignore")))
        raise ValueError(f"{at}: this is not {encoding[:6].upper()}, as the file begins. {REMEDY}") from e


def _unmarked(data: bytes, name: str) -> str:
    utf16 = _utf16(data)
    try:
        return data.decode(utf16 or "utf-8")
    except UnicodeDecodeError:
        pass
    if found := UNKNOWN.search(data):
        at = place(name, _line(data[: found.start()].decode("latin-1")))
        raise ValueError(f"{at}: this is neither UTF-8 nor Windows-1252, or the file is a mixture. {REMEDY}")
    return data.decode("cp1252")


def _utf16(data: bytes) -> str | None:
    """The byte order of UTF-16 without a mark. One stray zero byte is not enough to take a file for it."""
    if len(data) % 2 or 0 not in data:
        return None
    big, little = (data[half::2].count(0) for half in (0, 1))
    if (big and little) or max(big, little) * 4 <= len(data):
        return None
    return "utf-16-be" if big else "utf-16-le"


def _line(before: str) -> int:
    """The number of the line that comes after the text ``before``."""
    return plain(before).count("\n") + 1


def plain(text: str) -> str:
    """``text`` with newline characters as its only line ends; see the rules above."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")
    for space in SPACES:
        text = text.replace(space, " ")
    return text


def _split(text: str) -> Iterator[str]:
    """The lines of ``text`` with their ends, one by one: a list of them would take many times the text's memory."""
    text, start = plain(text), 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def _narrow(text: str, name: str) -> Iterator[str]:
    """`_split`; csv's own reader makes an object of every field, and knows no limit."""
    for number, line in enumerate(_split(text), 1):
        if line.count(",") > MAX_COMMAS:
            raise ValueError(f"{place(name, number)}: it has {line.count(',')} commas, which no line of csv has")
        yield line


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """(number, stripped) of each line that has anything."""
    for number, line in enumerate(_split(text), 1):
        if line := line.strip():
            yield number, line


def lines(text: str) -> list[str]:
    """The lines that have anything, stripped."""
    return [line for _, line in numbered(text)]


def value(text: str, name: str = "", line: int | None = None):
    """What a JSON text says; ``line``: the number of the line that it is, if it is one of many."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        known = isinstance(e, json.JSONDecodeError)
        reason = f"{e.msg} at character {e.colno}" if known else "lists in lists without end, or an endless number"
        at = place(name, line or (e.lineno if known else None))
        raise ValueError(f"{at}: it is not JSON ({reason})" if at else f"it is not JSON ({reason})") from None


def values(text: str, name: str) -> Iterator[tuple[int, object]]:
    """(number, value) of each line of jsonl."""
    return ((number, value(line, name, number)) for number, line in numbered(text))


def rows(text: str, name: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of its first line, column -> text) of each row of csv; "" where a row ends early."""
    reader, names = csv.reader(_narrow(text, name), strict=True), None
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as e:
            what = f"it is not CSV ({e}); is a quote not closed, or not doubled within a text?"
            raise ValueError(f"{place(name, number)}: {what}") from None
        if row is None:
            return
        if not row:
            continue
        if names is None:
            names = [n.strip().lower() for n in row]
            continue
        if any(row[len(names) :]):
            what = f"it has {len(row)} fields, the first line names {len(names)}; put quotes around a text with commas"
            raise ValueError(f"{place(name, number)}: {what}")
        yield number, dict(zip(names, row + [""] * len(names), strict=False))


def caption(text: object, where: str) -> str:
    """A caption on one line, "" for one that says nothing. ``where``: as `place` gives it."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: the caption is no text, but of type {type(text).__name__}. Put quotes around it")
    if found := CONTROL.search(text):
        raise ValueError(f"{where}: the caption has the control character U+{ord(found[0]):04X}. Delete it")
    words = " ".join(plain(text).split()) if len(text) <= MAX_CAPTION_FILE else text
    if len(words) > MAX_CAPTION:
        what = f"the caption has {len(words)} characters, at most {MAX_CAPTION} are read"
        raise ValueError(f"{where}: {what}. Shorten it")
    return words


def caption_file(path: Path) -> str:
    """The caption in a file of its own."""
    return caption(read(path, MAX_CAPTION_FILE), place(path.name))
