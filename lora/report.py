"""Says what became of every key of a LoRA file, each exactly once, in words and as JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..families import FAMILIES
from .keys import kind_of, unread
from .names import MODEL, TEXT, place
from .read import group
from .status import APPLIED, STATUSES

SHOWN = 6  # names of each status that the text lists
# What a file is for where no family's `lora_marks` say it
MARKS = (
    (r"transformer_blocks_\d+_(norm1_context|attn_add_|ff_context)", None, "Stable Diffusion 3 or FLUX.1"),
    (r"(input|output|down|up|mid|middle)_block", None, "a UNet (SD1.x, SD2.x or SDXL)"),
    (r"blocks_\d+_(self_attn|cross_attn|ffn)", None, "Wan or another video transformer"),
)


@dataclass(frozen=True)
class KeyReport:
    """``status``: key -> one of `STATUSES`. ``notes``: sentences about how it was applied. ``why``: key -> the reason
    that its status leaves open: a kind's name, two shapes.
    """

    file: str
    family: str
    kinds: Mapping[str, int]
    ranks: tuple[int, ...]
    status: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())
    why: Mapping[str, str] = field(default_factory=dict)

    def count(self, *statuses: str) -> int:
        return sum(s in statuses for s in self.status.values())

    @property
    def whole(self) -> bool:
        """Whether all of the file was applied."""
        return self.count(*APPLIED) == len(self.status)

    def keys(self, status: str) -> list[str]:
        return [k for k, s in self.status.items() if s == status]

    def text(self) -> str:
        """Markdown: one line for the file, one for the counts, and for each status that went wrong one a reason."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.kinds.items()) or "no LoRA layer"
        ranks = f", rank {_span(self.ranks)}" if self.ranks else ""
        lines = [f"**{self.file}**: {self.family}; {kinds}{ranks}"]
        counts = [f"{self.count(s)} {words}" for s, words in STATUSES.items() if self.count(s) or s == "model"]
        lines.append(f"{len(self.status)} keys: {', '.join(counts)}")
        for status in STATUSES:
            if status not in APPLIED and self.count(status):
                lines += [f"- {sentence}" for sentence in self.sentences(status)]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])

    def sentences(self, status: str) -> list[str]:
        """What to say of a status: its keys by reason, the first few reasons and how many more there are."""
        reasons: dict[str, list[str]] = {}
        for key in self.keys(status):
            reasons.setdefault(self.why.get(key, ""), []).append(key)
        words = STATUSES[status]
        shown = list(reasons.items())[:SHOWN]
        out = [f"{words}: {listed(keys)}{f' ({why})' if why else ''}" for why, keys in shown]
        others = sum(map(len, reasons.values())) - sum(len(keys) for _, keys in shown)
        return [*out, f"{words}: {others} more keys, for other reasons"] if others else out

    def reasons(self) -> str:
        """Why nothing was applied, in one line: how many keys for each reason."""
        counts = Counter((s, self.why.get(k, "")) for k, s in self.status.items() if s not in APPLIED)
        parts = [f"{n} {STATUSES[s]}{f' ({why})' if why else ''}" for (s, why), n in counts.most_common(3)]
        return ", ".join(parts) + (" ..." if len(counts) > 3 else "")

    def to_json(self) -> str:
        values = dict(file=self.file, family=self.family, kinds=dict(self.kinds), ranks=list(self.ranks))
        said = {"keys": dict(self.status), "why": dict(self.why), "notes": list(self.notes)}
        return json.dumps({**values, **said}, indent=1)


def listed(keys: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    keys = list(keys)
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


def _span(numbers: Iterable[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def describe(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, dict[str, int], tuple[int, ...]]:
    """(what the file is for, kind -> targets, ranks) from keys and their shapes alone."""
    groups, rest = group(shapes)
    others = dict(hit for hit in map(unread, rest) if hit is not None)  # target -> kind
    groups = [(target, parts) for target, parts in groups if target not in others]
    kinds = Counter(kind_of(parts) or "incomplete" for _, parts in groups)
    ranks = tuple(sorted({shapes[p["down"]][0] for _, p in groups if "down" in p and shapes[p["down"]]}))
    if others and not set(kinds) - {"incomplete"}:
        return f"holds {Counter(others.values()).most_common(1)[0][0]}, a kind that is not read", {}, ()
    return family_of(dict(groups), shapes), dict(kinds), ranks


def family_of(targets: Mapping[str, Mapping[str, str]], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What model the names and shapes look like, in words."""
    places = {target: place(target) for target in targets}
    for pattern, size, title in (*(mark for family in FAMILIES for mark in family.lora_marks), *MARKS):
        regex = re.compile(pattern)
        for target, spot in places.items():
            if spot.part == MODEL and regex.match(spot.name) and _has(targets[target], shapes, size):
                return f"looks like a LoRA for {title}"
    if places and all(p.part == TEXT for p in places.values()):
        return "changes a text encoder only"
    return "its names tell no model family"


def _has(parts: Mapping[str, str], shapes, size: tuple[str, int, int] | None) -> bool:
    if size is None:
        return True
    role, dimension, number = size
    shape = shapes[parts[role]] if role in parts else ()
    return len(shape) > dimension and shape[dimension] == number
