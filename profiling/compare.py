"""Several saved runs side by side: each number of the others over the first's."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from PIL import Image

from .report import KINDS, Run
from .tables import plain, seconds, size, table
from .timeline import stacked


def names(runs: Sequence[Run], given: Sequence[str]) -> list[str]:
    """What to call each run: its label, with the file's name where labels repeat or are missing."""
    labels = [r.label for r in runs]
    return [
        label if label and labels.count(label) == 1 else f"{label} ({name})".strip()
        for label, name in zip(labels, given, strict=True)
    ]


def measures(run: Run) -> dict[str, tuple[float, bool]]:
    """Every comparable number: name -> (value, whether it is bytes)."""
    out: dict[str, tuple[float, bool]] = {"whole run": (run.seconds, False)}
    out |= {kind: (t, False) for kind, t in run.by_kind().items() if t}
    for s in run.samplings:
        name = f"evaluation, {s.label}" if len(run.samplings) > 1 else "evaluation"
        out |= {name: (s.steady, False), name.replace("evaluation", "model weights"): (s.weight_bytes, True)}
        if s.activation:
            out[name.replace("evaluation", "activations")] = (s.activation, True)
    out["memory peak"] = (run.peak, True)
    return {name: value for name, value in out.items() if value[0]}


def rows(runs: Sequence[Run]) -> list[tuple[str, list[tuple[float, bool] | None]]]:
    """(measure, its value in each run or None), every measure that any run has."""
    if len(runs) < 2:
        raise ValueError("a comparison needs two runs or more. Choose a second one")
    found = [measures(r) for r in runs]
    order = list(dict.fromkeys(name for f in found for name in f))
    return [(name, [f.get(name) for f in found]) for name in order]


def markdown(runs: Sequence[Run], labels: Sequence[str]) -> str:
    """A ratio table: the first run is 1, below 1 is less time or memory."""
    head = ["measure", *labels, *(f"{label} / {labels[0]}" for label in labels[1:])]
    body = []
    for name, values in rows(runs):
        cells = ["-" if v is None else (size(v[0]) if v[1] else seconds(v[0])) for v in values]
        ratios = ["-" if v is None or values[0] is None else f"{v[0] / values[0][0]:.2f}" for v in values[1:]]
        body.append((name, *cells, *ratios))
    lines = table(head, body)
    devices = list(dict.fromkeys(r.device.name for r in runs))
    if len(devices) > 1:
        lines += ["", f"Measured on different machines ({', '.join(devices)}): the ratios compare those, too."]
    if any(r.state != "complete" for r in runs):
        lines += ["", "A run that was stopped is in the table: its numbers end where it did."]
    return "\n".join(lines)


def to_csv(runs: Sequence[Run], labels: Sequence[str]) -> str:
    """One row a measure: plain seconds and bytes, then ratios to the first run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["measure", "unit", *map(plain, labels), *(plain(f"{label} ratio") for label in labels[1:])])
    for name, values in rows(runs):
        unit = "bytes" if next(v for v in values if v is not None)[1] else "seconds"
        cells = ["" if v is None else v[0] for v in values]
        ratios = ["" if v is None or values[0] is None else v[0] / values[0][0] for v in values[1:]]
        writer.writerow([plain(name), unit, *cells, *ratios])
    return out.getvalue()


def chart(runs: Sequence[Run], labels: Sequence[str]) -> Image.Image:
    """Two panels: seconds by kind of node, and the memory peak; one bar a run."""
    rows(runs)
    time = stacked("Seconds by kind of node", [
        (label, [(k, run.by_kind()[k]) for k in KINDS] + [("between", run.between)], seconds(run.seconds))
        for label, run in zip(labels, runs, strict=True)
    ])  # fmt: skip
    limits = {r.device.limit for r in runs}
    limit = limits.pop() if len(limits) == 1 else 0
    title = f"Memory peak (of {size(limit)})" if limit else "Memory peak"
    bars = [(label, [("peak", run.peak)], size(run.peak)) for label, run in zip(labels, runs, strict=True)]
    memory = stacked(title, bars, limit)
    out = Image.new("RGB", (time.width, time.height + memory.height), (255, 255, 255))
    out.paste(time, (0, 0))
    out.paste(memory, (0, time.height))
    return out
