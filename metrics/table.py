"""Scores as markdown and CSV: one row a picture, and a line of means."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scores:
    """``each``: measure -> one value a picture; ``overall``: measure -> one value for all; ``notes``: what was left
    out and why, and how far to trust the rest.
    """

    names: tuple[str, ...]
    each: Mapping[str, Sequence[float]]
    overall: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        for measure, values in self.each.items():
            if len(values) != len(self.names):
                raise ValueError(f"{measure}: {len(values)} values for {len(self.names)} pictures")

    def markdown(self, limit: int = 200) -> str:
        lines = []
        if self.overall:
            lines += ["| measure | value |", "|---|---|"]
            lines += [f"| {name} | {number(value)} |" for name, value in self.overall.items()]
        if self.each:
            lines += ["", "| picture | " + " | ".join(self.each) + " |", "|---" * (len(self.each) + 1) + "|"]
            for i, name in enumerate(self.names[:limit]):
                safe = name.replace("|", "\\|").replace("\n", " ")
                lines.append(f"| {safe} | " + " | ".join(number(v[i]) for v in self.each.values()) + " |")
            if len(self.names) > limit:
                lines.append(f"\n{len(self.names) - limit} more pictures are in the CSV.")
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]).strip()

    def to_csv(self) -> str:
        """A row a picture, then a row named 'all' with the overall values and the means of the rest."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        only = [name for name in self.overall if name not in self.each]
        writer.writerow(["picture", *self.each, *only])
        for i, name in enumerate(self.names):
            writer.writerow([_plain(name), *(v[i] for v in self.each.values()), *([""] * len(only))])
        means = [self.overall.get(name, mean(values)) for name, values in self.each.items()]
        writer.writerow(["all", *means, *(self.overall[name] for name in only)])
        return out.getvalue()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def number(value: float) -> str:
    """Five significant digits; 'equal' for the infinite PSNR of equal pictures."""
    return "equal" if math.isinf(value) else f"{value:.5g}"


def _plain(text: str) -> str:
    """A cell that a spreadsheet will not take for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
