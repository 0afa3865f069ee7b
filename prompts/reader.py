"""Reads a YAML file that a stranger may have written: texts, numbers, lists and mappings, and nothing else.

Tags, anchors, aliases, merges, repeated keys, deep nesting and hidden characters are refused with the line. ``yes``,
``no``, ``on`` and dates stay texts; only plain whole and decimal numbers become numbers.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from ..reading import textfile
from ..reading.names import place, shown
from . import text as texts

MAX_FILE, MAX_DEPTH, MAX_NODES = 256 * 1024, 12, 20_000
WHOLE, DECIMAL = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class DomainError(ValueError):
    """A domain or a prompt that cannot be used; the message says what, where and what to do."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own class attribute, filled below

    depth = nodes = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _refused("anchors and aliases (& and *) are not allowed; write the text out", event)
        if event.tag is not None:
            raise _refused("tags (!) are not allowed; put quotes around a text that starts with !", event)
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > MAX_DEPTH:
            raise _refused(f"more than {MAX_DEPTH} levels of lists and mappings", event)
        if self.nodes > MAX_NODES:
            raise _refused(f"more than {MAX_NODES} values", event)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                raise _refused("a key must be a plain text", key)
            if key.value in seen:
                raise _refused(f"the key {key.value[:40]!r} is there twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(WHOLE, re.compile(r"-?(?:0|[1-9][0-9]{0,11})$"), list("-0123456789"))
_Loader.add_implicit_resolver(DECIMAL, re.compile(r"-?[0-9]{1,6}\.[0-9]{1,6}$"), list("-0123456789"))


def _refused(what: str, at) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=at.start_mark)


def read(path: Path) -> str:
    """The text of ``path``, an ordinary file of at most `MAX_FILE` bytes. Raises DomainError."""
    try:
        content = textfile.read(path, MAX_FILE)
    except ValueError as e:
        raise DomainError(str(e)) from None
    hidden = texts.HIDDEN.search(content)
    if hidden:
        at = place(path.name, content.count("\n", 0, hidden.start()) + 1)
        raise DomainError(f"{at}: hidden character U+{ord(hidden[0]):04X}; delete it")
    return content


def parse(content: str, where: str, first: int = 1):
    """The data of a YAML text whose first line is the ``first``. Raises DomainError with ``where`` and the line."""
    if len(content) > MAX_FILE:
        raise DomainError(f"{shown(where)}: larger than {MAX_FILE // 1024} KiB")
    try:
        return _Loader(content).get_single_data()
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None) or getattr(e, "context_mark", None)
        problem = getattr(e, "problem", None) or getattr(e, "reason", None) or "not YAML"
        at = place(where, mark.line + first if mark else None)
        raise DomainError(f"{at}: {' '.join(str(problem).split())}") from None


def lines(path: Path) -> tuple[str, ...]:
    """The entries of a wildcard list: one a line; lines that start with # do not count."""
    return tuple(line for line in textfile.lines(read(path)) if not line.startswith("#"))
