"""What the profiling nodes hand out: strings, pictures as IMAGE, and what the front end shows."""

from __future__ import annotations

import numpy as np
import torch

from ...profiling import compare, tables
from ...profiling.report import Run
from ...profiling.timeline import timeline
from . import records


def image(picture) -> torch.Tensor:
    """A PIL picture as ComfyUI's IMAGE: (1, H, W, 3) float in [0, 1]."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]


def outputs(run: Run) -> tuple[str, str, torch.Tensor]:
    """(markdown, JSON, chart)"""
    return tables.markdown(run), run.to_json(), image(timeline(run))


def ui(run: Run, files: records.Files) -> dict:
    """What the profiler node shows: the chart, the text, and its rows for a front end."""
    rows = [
        {"title": n.title, "kind": n.kind, "state": n.state, "seconds": n.seconds, "steps": tables.step_text(n)}
        for n in run.nodes
    ]
    shown = {"label": run.label, "seconds": run.seconds, "peak": run.peak, "rows": rows, "file": files.shown(".json")}
    return {"images": [files.shown(".png")], "text": [tables.markdown(run)], "nibble_run": [shown]}


def compared(choices: list[str]) -> tuple[str, str, torch.Tensor]:
    """(markdown, CSV, chart) of saved runs, 'none' left out. Raises ValueError for fewer than two."""
    names = [records.name_of(n) for n in choices if n != records.NONE]
    runs = [records.load(n) for n in names]
    labels = compare.names(runs, [n.removesuffix(".json").rstrip("_") for n in names])
    return compare.markdown(runs, labels), compare.to_csv(runs, labels), image(compare.chart(runs, labels))
