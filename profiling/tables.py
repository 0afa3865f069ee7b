"""A run, or several, as markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from .report import Node, Run

MIB, GIB = 2**20, 2**30
CSV_COLUMNS = (
    "id", "title", "kind", "state", "start_s", "seconds", "elapsed_s", "steps", "step_median_s", "allocated_bytes",
    "reserved_bytes", "process_bytes", "host_bytes",
)  # fmt: skip


def size(n: float) -> str:
    """Bytes for people: 512 B, 1.5 MiB, 3.25 GiB."""
    if abs(n) >= GIB:
        return f"{n / GIB:.2f} GiB"
    return f"{n / MIB:.1f} MiB" if abs(n) >= MIB / 10 else f"{n:.0f} B"


def seconds(t: float) -> str:
    """Seconds for people: 0.34 ms, 56.7 ms, 1.23 s, 83 s."""
    if t < 1:
        return f"{1000 * t:.2f} ms" if t < 0.01 else f"{1000 * t:.1f} ms"
    return f"{t:.2f} s" if t < 60 else f"{t:.0f} s"


def row(*cells) -> str:
    """One markdown table row; a pipe or line break in a cell cannot end it."""
    return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence]) -> list[str]:
    return [row(*head), "|" + "---|" * len(head), *(row(*r) for r in rows)]


def markdown(run: Run) -> str:
    """The whole report: where the time went, then what each model's sampling took, then memory."""
    ran = [n for n in run.nodes if n.state in ("ran", "stopped")]
    lines = [f"**{run.label or 'run'}**: {run.state}, {seconds(run.seconds)} on {run.device.name}", ""]
    lines += table(
        ("node", "what", "state", "seconds", "share", "steps", "peak memory"),
        [_node_row(n, run) for n in sorted(ran, key=lambda n: -n.seconds)]
        + [(n.title, n.kind, n.state, "", "", "", "") for n in run.nodes if n not in ran],
    )
    kinds = ", ".join(f"{kind} {seconds(t)}" for kind, t in run.by_kind().items() if t)
    lines += ["", f"By kind: {kinds or 'nothing ran'}; between nodes {seconds(run.between)}."]
    if run.samplings:
        lines += ["", *models(run)]
    return "\n".join([*lines, "", *memory_lines(run)])


def _node_row(node: Node, run: Run) -> tuple:
    share = node.seconds / run.seconds if run.seconds else 0.0
    peak = node.peaks.host if run.device.kind == "cpu" else node.peaks.device
    return (
        node.title, node.kind, node.state, seconds(node.seconds), f"{share:.0%}", step_text(node),
        size(peak) if peak else "",
    )  # fmt: skip


def step_text(node: Node) -> str:
    """'4 x 0.12 s': the number of steps and their mean; with '~' where they were read from the progress bar."""
    if not node.steps:
        return ""
    mean = sum(node.steps) / len(node.steps)
    return f"{len(node.steps)} x {'' if node.exact else '~'}{seconds(mean)}"


def models(run: Run) -> list[str]:
    """Markdown: one row a self-recording model, the one with the largest weights first and the others against it."""
    ordered = sorted(run.samplings, key=lambda s: -s.weight_bytes)
    first = ordered[0]
    rows = []
    for s in ordered:
        ratio = s.steady / first.steady if first.steady else 0.0
        rows.append((
            s.label, s.weights, size(s.weight_bytes), f"{s.weight_bytes / max(1, first.weight_bytes):.2f}x",
            len(s.evaluations), seconds(s.warm_up), seconds(s.steady), f"{ratio:.2f}x", seconds(s.load_seconds),
            size(s.activation) if s.activation else "-",
        ))  # fmt: skip
    head = ("model", "weights", "size", "ratio", "evaluations", "first (warm-up)", "each next", "ratio", "load",
            "activations")  # fmt: skip
    return table(head, rows)


def memory_lines(run: Run) -> list[str]:
    """What the memory numbers are, each with its name: no one of them tells all."""
    p = run.peaks
    lines = [f"Memory peak {size(run.peak)} of {size(run.device.limit)}."]
    if run.device.kind == "cpu":
        return [*lines, "On a CPU this is the resident memory of the whole process; nodes cannot be told apart."]
    parts = [f"torch allocated {size(p.allocated)}", f"torch reserved {size(p.reserved)}"]
    parts.append(f"driver, this process {size(p.process)}" if p.process else "driver: install nvidia-ml-py to see it")
    return [*lines, "Highest: " + "; ".join([*parts, f"host {size(p.host)}"]) + "."]


def to_csv(run: Run) -> str:
    """One row a node, in the workflow's order of first start; bytes and seconds as plain numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for n in run.nodes:
        median = sorted(n.steps)[len(n.steps) // 2] if n.steps else ""
        writer.writerow([
            n.id, plain(n.title), n.kind, n.state, n.start, n.seconds, n.elapsed, len(n.steps), median,
            n.peaks.allocated, n.peaks.reserved, n.peaks.process, n.peaks.host,
        ])  # fmt: skip
    return out.getvalue()


def plain(text: str) -> str:
    """A CSV cell that a spreadsheet will not take for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
