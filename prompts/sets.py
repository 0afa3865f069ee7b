"""Prompt sets that people have as files: read, filtered, and drawn by seed into two halves that share nothing.

One row of `FORMATS` is one way a file can be. Nothing is downloaded; a missing file is named with its address. Every
caption is cleaned as anything that a person types: one line, no hidden characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..reading import textfile
from ..reading.names import shown
from . import draw, reader, sets_words
from .calibration import MAX_LENGTH
from .spec import Domain
from .text import clean

MIB = 2**20
FIELDS = ("prompt", "caption", "text")
KEYS = ("image_id", "image", "file_name", "filename", "id")
MAX_PROMPTS = 2_000_000


@dataclass(frozen=True)
class Entry:
    """``key``: of the picture, which may have several captions; ``category``: as the set names it, or ""."""

    key: str
    text: str
    category: str = ""


@dataclass(frozen=True)
class Format:
    """``usual``: name of the published file; ``address``: where it is; ``largest``: MiB that are read."""

    id: str
    usual: str
    address: str
    largest: int
    read: Callable[[str], Iterable[Entry]]


@dataclass(frozen=True)
class Drawn:
    """Prompts for calibrating and for evaluating: no picture is in both. The rest counts what became of the file."""

    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]
    there: int
    usable: int
    matching: int


def _coco(content: str) -> Iterator[Entry]:
    """{"annotations": [{"image_id", "caption"}, ...]}"""
    data = textfile.value(content)
    rows = data.get("annotations") if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise ValueError('it has no list "annotations" as COCO Captions has')
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("caption"), str):
            yield Entry(str(row.get("image_id", row["caption"])), row["caption"])


def _mjhq(content: str) -> Iterator[Entry]:
    """{picture: {"prompt", "category"}, ...}"""
    data = textfile.value(content)
    if not isinstance(data, dict):
        raise ValueError("it is no mapping of pictures to prompts as MJHQ-30K's meta_data.json is")
    for key, row in data.items():
        if isinstance(row, dict) and isinstance(row.get("prompt"), str):
            yield Entry(key, row["prompt"], str(row.get("category", "")))


SPECIAL = re.compile(r"""^[-?:,\[\]{}#&*!|>'"%@`]|: |:$| #""")


def _sdci(content: str) -> Iterator[Entry]:
    """YAML, ``picture: prompt``. Entries are read one by one: plain ones fast, others by the strict YAML reader."""
    end = 0
    for entry in re.split(r"\n(?=[^\s#])", content):
        first, end = end + 1, end + 1 + entry.count("\n")
        name, colon, value = entry.partition(":")
        words = " ".join(value.split())
        if not colon or name.startswith(("#", "---")):
            continue
        if SPECIAL.search(words) or name[:1] in "'\"":
            data = reader.parse(entry, "sDCI", first)
            yield from (Entry(str(k), v) for k, v in data.items() if isinstance(v, str))
        elif words:
            yield Entry(name.strip(), words)


def _jsonl(content: str) -> Iterator[Entry]:
    """An object or a text on each line; the caption is in "prompt", "caption" or "text"."""
    for number, row in textfile.values(content, ""):
        if not isinstance(row, (dict, str)):
            raise ValueError(f"line {number}: it is neither an object nor a text")
        yield from _row(row if isinstance(row, dict) else {"text": row}, number)


def _csv(content: str) -> Iterator[Entry]:
    """A first line with names; the caption is in the column prompt, caption or text."""
    for number, row in textfile.rows(content, ""):
        if not row.keys() & set(FIELDS):
            raise ValueError(f"its first line names no column {', '.join(FIELDS)}")
        yield from _row(row, number)


def _row(row: dict, number: int) -> Iterator[Entry]:
    """One entry, or none where there is no caption; the first of a list of captions."""
    value = next((row[f] for f in FIELDS if row.get(f) not in (None, "", [])), None)
    value = value[0] if isinstance(value, list) else value
    if isinstance(value, str):
        key = next((row[k] for k in KEYS if row.get(k) not in (None, "")), value)
        yield Entry(str(key), value, str(row.get("category") or ""))
    elif value is not None:
        raise ValueError(f"line {number}: its caption is no text, but of type {type(value).__name__}")


def _text(content: str) -> Iterator[Entry]:
    """One prompt a line; lines that start with # do not count."""
    return (Entry(line, line) for _, line in textfile.numbered(content) if not line.startswith("#"))


COCO = "https://cocodataset.org/#download"
OWN = "It is a file of your own"
FORMATS = {
    f.id: f
    for f in (
        Format("COCO Captions", "captions_val2017.json", COCO, 128, _coco),
        Format("MJHQ-30K", "meta_data.json", "https://huggingface.co/datasets/playgroundai/MJHQ-30K", 64, _mjhq),
        Format("sDCI", "sDCI.yaml", "https://huggingface.co/datasets/mit-han-lab/svdquant-datasets", 32, _sdci),
        Format("jsonl", "prompts.jsonl", "", 64, _jsonl),
        Format("csv", "prompts.csv", "", 64, _csv),
        Format("text", "prompts.txt", "", 16, _text),
    )
}


def missing(format: Format, name: str) -> str:
    """A sentence for a file that is not there."""
    name = shown(name)
    if format.address:
        return f"input/{name} is not there. {format.id} is published at {format.address}; put the file into input/"
    return f"input/{name} is not there. {OWN} ({format.id}); put it into ComfyUI's input folder"


def read(format: Format, path: Path) -> list[Entry]:
    """Every entry of a file. Raises ValueError in one sentence for a file over the cap or of another form."""
    content, name = textfile.read(path, format.largest * MIB), shown(path.name)
    found: list[Entry] = []
    try:
        for entry in format.read(content):
            found.append(entry)
            if len(found) > MAX_PROMPTS:
                raise ValueError(f"it has more than {MAX_PROMPTS} entries")
    except ValueError as e:
        raise ValueError(f"{name} cannot be read as {format.id}: {e}. Choose another set or file") from None
    if not found:
        raise ValueError(f"{name} has no prompt that can be read as {format.id}. Choose another set or file")
    return found


def texts(path: Path) -> list[str]:
    """The prompts of a file in their order, repeats too, by its ending: .jsonl, .csv, or else one a line.

    Raises ValueError in one sentence for a file without any, and as `read` does.
    """
    kind = path.suffix.lower().removeprefix(".")
    entries = read(FORMATS[kind if kind in ("jsonl", "csv") else "text"], path)
    found = [words for words in (clean(entry.text) for entry in entries) if words]
    long = next((i for i, words in enumerate(found) if len(words) > MAX_LENGTH), None)
    if long is not None or not found:
        what = f"prompt {long + 1} has more than {MAX_LENGTH} characters" if found else "it has no prompt"
        raise ValueError(f"{shown(path.name)}: {what}")
    return found


def usable(entries: Iterable[Entry]) -> list[Entry]:
    """The first caption of each picture, cleaned; repeats, empty ones and those over the length cap are left out."""
    keys, seen, out = set(), set(), []
    for e in entries:
        text = clean(e.text)
        if text and len(text) <= MAX_LENGTH and e.key not in keys and text.casefold() not in seen:
            keys.add(e.key)
            seen.add(text.casefold())
            out.append(Entry(e.key, text, e.category))
    return out


def matching(entries: list[Entry], domain: Domain | None, words: str) -> list[Entry]:
    """Those of the domain, and with any of the comma-separated ``words``; all where neither is given."""
    if domain is not None:
        entries = [e for e in entries if sets_words.belongs(domain, e.text, e.category)]
    wanted = {w for part in words.split(",") for w in sets_words.words(part)}
    return [e for e in entries if wanted & sets_words.words(e.text)] if wanted else entries


def drawn(entries: list[Entry], domain: Domain | None, words: str, counts: tuple[int, int], seed: int) -> Drawn:
    """``counts`` prompts for (calibration, evaluation): from the front and the back of one order that ``seed`` fixes,
    so a larger calibration set leaves the evaluation set as it is until they would meet.

    Raises ValueError when nothing matches.
    """
    good = usable(entries)
    texts = [e.text for e in matching(good, domain, words)]
    if not texts:
        wanted = [f"belongs to {domain.id}"] if domain else []
        wanted += ["has any of the words"] if words.strip() else []
        what = " and ".join(wanted) or "can be used"
        raise ValueError(f"none of the {len(good)} prompts {what}. Choose another domain or words")
    order = draw.shuffled(texts, seed, "set")
    first, second = counts
    rest = order[first:]
    back = rest[max(0, len(rest) - second) :][::-1] if second else []
    return Drawn(tuple(order[:first]), tuple(back), len(entries), len(good), len(texts))


def report(format: Format, name: str, found: Drawn) -> str:
    """Markdown for a person."""
    address = f", published at {format.address}" if format.address else ""
    return "\n".join([
        f"| set | {format.id}: input/{name}{address} |", "|---|---|",
        f"| captions in the file | {found.there} |",
        f"| one a picture, no repeats, at most {MAX_LENGTH} characters | {found.usable} |",
        f"| of the domain and words | {found.matching} |",
        f"| for calibration | {len(found.calibration)} |",
        f"| for evaluation | {len(found.evaluation)} |",
    ])  # fmt: skip
