"""Draws runs with PIL, made to be read at half its size (512 pixels): when each node ran, its steps, and the memory
curve under the card's limit. Same run, same picture.
"""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from .chart import COLOURS, FAINT, INK, PAPER, fit
from .report import KINDS, Node, Run
from .tables import seconds, size

WIDTH = 1024
PAD, LABEL, ROW, CURVE = 24, 300, 44, 240
TEXT, TITLE, SMALL = 24, 30, 22  # pixels; half of the smallest is still 11
LINE, LIMIT, GRID = (24, 90, 188), (219, 68, 55), (232, 234, 237)
MOST = 14  # nodes with a row of their own; the rest share one
COLOUR = dict(zip(KINDS, COLOURS, strict=False))


def font(pixels: int):
    return ImageFont.load_default(pixels)


def timeline(run: Run) -> Image.Image:
    """The whole picture of a run: title, one bar a node over time with a tick a step, then memory over time."""
    nodes = sorted((n for n in run.nodes if n.state in ("ran", "stopped")), key=lambda n: -n.seconds)
    shown = sorted(nodes[:MOST], key=lambda n: n.start)
    hidden = nodes[MOST:]
    cached = sum(n.state == "cached" for n in run.nodes)
    lines = [f"{len(nodes)} ran, {cached} cached, {seconds(run.between)} between nodes"]
    if hidden:
        lines[0] += f"; not drawn: {len(hidden)}, together {seconds(sum(n.seconds for n in hidden))}"
    head = PAD + TITLE + TEXT + 28
    rows = max(1, len(shown))
    height = head + rows * ROW + 60 + (CURVE + 50 if run.curve else 0) + PAD
    image = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(image)
    title = f"{run.label or 'run'}: {seconds(run.seconds)}" + ("" if run.state == "complete" else f" ({run.state})")
    draw.text((PAD, PAD), fit(title, font(TITLE), WIDTH - 2 * PAD), INK, font=font(TITLE))
    draw.text((PAD, PAD + TITLE + 8), fit(lines[0], font(SMALL), WIDTH - 2 * PAD), FAINT, font=font(SMALL))
    room = WIDTH - LABEL - 2 * PAD
    scale = room / max(run.seconds, 1e-9)
    for i, node in enumerate(shown):
        _node(draw, node, head + i * ROW, scale)
    _axis(draw, head + rows * ROW, run.seconds, room)
    if run.curve:
        _curve(draw, run, head + rows * ROW + 70, scale)
    return image


def _node(draw: ImageDraw.ImageDraw, node: Node, y: int, scale: float) -> None:
    """One row: the name, a faint bar for the time it was open, a full one for its own, ticks between its steps."""
    draw.text((PAD, y + 6), fit(node.title, font(TEXT), LABEL - 12), INK, font=font(TEXT))
    left = PAD + LABEL + node.start * scale
    colour = COLOUR[node.kind]
    own, open_ = max(3, node.seconds * scale), max(3, node.elapsed * scale)
    draw.rectangle((left, y + 10, left + open_, y + ROW - 10), fill=tuple((c + 510) // 3 for c in colour))
    draw.rectangle((left, y + 10, left + own, y + ROW - 10), fill=colour)
    at = left + own - sum(node.steps) * scale if node.exact else left
    for step in node.steps[:-1]:
        at += step * scale
        if step * scale > 4:
            draw.line((at, y + 10, at, y + ROW - 10), fill=PAPER, width=2)
    text = seconds(node.seconds) + (f", {len(node.steps)} steps" if len(node.steps) > 1 else "")
    text += " stopped here" if node.state == "stopped" else ""
    width = draw.textlength(text, font=font(SMALL))
    right = left + max(own, open_) + 8
    inside = right + width > WIDTH - PAD
    on_bar = inside and own > width + 16
    x = max(PAD + LABEL, (left + 8 if on_bar else left - width - 8) if inside else right)
    if on_bar:  # step ticks would cross the letters
        draw.rectangle((x - 2, y + 10, x + width + 4, y + ROW - 10), fill=colour)
    draw.text((x, y + 8), text, PAPER if on_bar else INK, font=font(SMALL))


def _axis(draw: ImageDraw.ImageDraw, y: int, total: float, room: int) -> None:
    """Times under the bars: start, quarters, end."""
    for i in range(5):
        x = PAD + LABEL + room * i / 4
        draw.line((x, y, x, y + 8), fill=FAINT, width=2)
        text = seconds(total * i / 4) if i else "0"
        width = draw.textlength(text, font=font(SMALL))
        draw.text((min(x - width / 2, WIDTH - PAD - width), y + 12), text, FAINT, font=font(SMALL))


def _curve(draw: ImageDraw.ImageDraw, run: Run, top: int, scale: float) -> None:
    """Memory over time. Where the peak is under a quarter of the limit, the limit is drawn above a broken axis."""
    peak = max(max(p.device for p in run.curve), 1)
    limit = run.device.limit
    broken = limit > 4 * peak
    most = peak * 1.25 if broken or not limit else max(limit, peak) * 1.05
    left, right, bottom = PAD + LABEL, WIDTH - PAD, top + 36 + CURVE
    what = "process memory" if run.device.kind == "cpu" else "GPU memory"
    draw.text((PAD, top), f"{what}, peak {size(run.peak)}", INK, font=font(TEXT))
    draw.rectangle((left, top + 36, right, bottom), outline=GRID, width=2)

    def y_of(n: float) -> float:
        return bottom - (CURVE - (34 if broken else 0)) * n / most

    for n in (peak / 2, peak):
        draw.line((left, y_of(n), right, y_of(n)), fill=GRID, width=2)
        draw.text((PAD, y_of(n) - 14), size(n), FAINT, font=font(SMALL))
    points = [(left + p.t * scale, y_of(p.device)) for p in run.curve]
    draw.line([*points, *points[-1:]], fill=LINE, width=4, joint="curve")
    if limit:
        y = top + 50 if broken else y_of(limit)
        for x in range(left, right, 20):
            draw.line((x, y, x + 10, y), fill=LIMIT, width=4)
        text = f"limit {size(limit)}" + (" (axis broken)" if broken else "")
        draw.text((PAD, y - 14), fit(text, font(SMALL), LABEL - 8), LIMIT, font=font(SMALL))


def stacked(title: str, rows: list[tuple[str, list[tuple[str, float]], str]], limit: float = 0.0) -> Image.Image:
    """Bars of parts, one row each: (label, [(part, value)], text at the end). Parts of one name share a colour and
    stand in the legend; ``limit`` is drawn as a line where it lies within the picture.
    """
    parts = list(dict.fromkeys(name for _, values, _ in rows for name, v in values if v))
    others = [name for name in parts if name not in COLOUR]
    colour = COLOUR | {name: COLOURS[(len(COLOUR) + i) % len(COLOURS)] for i, name in enumerate(others)}
    head = PAD + TITLE + SMALL + 34
    image = Image.new("RGB", (WIDTH, head + len(rows) * ROW + PAD), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((PAD, PAD), fit(title, font(TITLE), WIDTH - 2 * PAD), INK, font=font(TITLE))
    x = PAD
    for name in parts:
        draw.rectangle((x, PAD + TITLE + 14, x + 18, PAD + TITLE + 32), fill=colour[name])
        draw.text((x + 24, PAD + TITLE + 8), name, FAINT, font=font(SMALL))
        x += 44 + draw.textlength(name, font=font(SMALL))
    room = WIDTH - LABEL - 2 * PAD - 190
    most = max((sum(v for _, v in values) for _, values, _ in rows), default=0) or 1
    for i, (label, values, text) in enumerate(rows):
        y, at = head + i * ROW, float(PAD + LABEL)
        draw.text((PAD, y + 6), fit(label, font(TEXT), LABEL - 12), INK, font=font(TEXT))
        for name, value in values:
            if value:
                draw.rectangle((at, y + 10, at + room * value / most, y + ROW - 10), fill=colour[name])
                at += room * value / most
        draw.text((at + 10, y + 8), text, INK, font=font(SMALL))
    if 0 < limit <= most * 1.2:
        at = PAD + LABEL + room * limit / most
        draw.line((at, head - 6, at, image.height - PAD), fill=LIMIT, width=4)
    return image
