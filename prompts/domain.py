"""The domains that come with the pack, and files of people's own: docs/domains.md shows every shipped one.

A shipped file is named by its id (food@1.yaml) and never changes once released: a change is a new version beside it.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from . import reader, schema
from .reader import DomainError
from .spec import Domain

FOLDER = Path(__file__).parent / "domains"
LISTS = "lists"


def _version(id: str) -> tuple[str, int]:
    name, _, version = id.partition("@")
    return name, int(version) if version.isdecimal() else 0


def shipped() -> list[str]:
    """The ids of the domains that come with the pack, each name's newest version last."""
    return sorted((p.stem for p in FOLDER.glob("*.yaml")), key=_version)


def load(name: str, folder: Path = FOLDER) -> Domain:
    """The domain ``name`` of ``folder``; without @version, its newest. Raises DomainError naming those there are."""
    known = {p.stem: p for p in folder.glob("*.yaml")}
    found = sorted((i for i in known if name in (i, i.partition("@")[0])), key=_version)
    if not found:
        raise DomainError(f"unknown domain {name[:80]!r}; there are {', '.join(sorted(known)) or 'none'}")
    return load_file(known[found[-1]])


def load_file(path: Path) -> Domain:
    """The domain in ``path``. Its lists are in the folder ``lists`` beside it, or shipped. Raises DomainError."""
    return _shipped(path) if path.parent == FOLDER else _parsed(path)


@lru_cache(maxsize=64)
def _shipped(path: Path) -> Domain:
    return _parsed(path)


def _parsed(path: Path) -> Domain:
    folders = tuple(dict.fromkeys((path.parent / LISTS, FOLDER / LISTS)))

    def read_list(name: str) -> tuple[str, ...]:
        there = [f / f"{name}.txt" for f in folders if (f / f"{name}.txt").is_file()]
        if not there:
            raise DomainError(f"there is no list {name!r}; write {LISTS}/{name}.txt beside the domain")
        if len(there) > 1:
            raise DomainError(f"the list {name!r} beside the domain has the name of a shipped one; rename it")
        return reader.lines(there[0])

    return schema.parse(reader.parse(reader.read(path), path.name), path.name, read_list)
