"""A domain: one YAML file, read with the safe loader and checked key by key. Nothing in it is ever executed.

id           name@version; a released version never changes
template     text with {slot} marks; {subject} is what the person types
slots        slot -> choices: list of strings
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

FOLDER = Path(__file__).parent / "domains"
MARK = re.compile(r"\{([a-z_]+)\}")
SUBJECT = "subject"
MAX_FILE, MAX_TEXT, MAX_CHOICES = 256 * 1024, 2000, 1000


@dataclass(frozen=True)
class Domain:
    """A checked domain file. ``slots``: name -> the texts it may become, in file order."""

    id: str
    title: str
    description: str
    template: str
    slots: dict[str, tuple[str, ...]]


def load(name: str, folder: Path = FOLDER) -> Domain:
    """The domain ``name`` (without version) of ``folder``. Raises ValueError saying what is wrong and where."""
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"unknown domain {name!r}; there are {', '.join(known)}")
    path = folder / f"{name}.yaml"
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"{path.name} is larger than {MAX_FILE // 1024} KiB")
    return parse(yaml.safe_load(path.read_text(encoding="utf-8")), path.name)


def parse(data, where: str) -> Domain:
    """A Domain from loaded YAML. Raises ValueError naming the key that is missing, unknown or of the wrong kind."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: a domain is a mapping of keys, got {type(data).__name__}")
    texts = {}
    for key in ("id", "title", "description", "template"):
        value = data.get(key)
        if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT:
            raise ValueError(f"{where}: {key!r} must be a text of 1 to {MAX_TEXT} characters")
        texts[key] = value
    unknown = set(data) - set(texts) - {"slots"}
    if unknown:
        raise ValueError(f"{where}: unknown key {min(map(str, unknown))!r}")
    if not re.fullmatch(r"[a-z0-9-]+@[0-9]+", texts["id"]):
        raise ValueError(f"{where}: id {texts['id']!r} is not of the form name@version")
    slots = {name: _choices(name, value, where) for name, value in (data.get("slots") or {}).items()}
    for mark in MARK.findall(texts["template"]):
        if mark != SUBJECT and mark not in slots:
            raise ValueError(f"{where}: the template names slot {mark!r}, which has no choices")
    return Domain(**texts, slots=slots)


def _choices(name, value, where: str) -> tuple[str, ...]:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z_]+", name):
        raise ValueError(f"{where}: slot name {name!r} must be lower-case letters and _")
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or not 0 < len(choices) <= MAX_CHOICES:
        raise ValueError(f"{where}: slot {name!r} needs 'choices', a list of 1 to {MAX_CHOICES} texts")
    if not all(isinstance(c, str) and len(c) <= MAX_TEXT for c in choices):
        raise ValueError(f"{where}: every choice of slot {name!r} must be a text")
    return tuple(choices)
