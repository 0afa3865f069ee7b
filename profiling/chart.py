"""Draws a profile with PIL: bars of seconds for stages and steps, bars of bytes for parts. Same input, same picture."""

from __future__ import annotations

from bisect import bisect_right

from PIL import Image, ImageDraw, ImageFont

from .recorder import Stage

WIDTH, ROW, LABEL, PAD, VALUE = 960, 26, 300, 16, 150
INK, FAINT, PAPER = (32, 33, 36), (154, 160, 166), (255, 255, 255)
DOTS = "..."
COLOURS = ((66, 133, 244), (234, 134, 0), (52, 168, 83), (171, 71, 188), (0, 150, 167), (219, 68, 55))


def fit(text: str, font, width: float) -> str:
    """``text`` on one line, cut with dots where it is wider than ``width`` pixels.

    Labels come from workflows of strangers and may have any length. No more letters are looked at than there are
    pixels, and how many of them fit is found by bisection.
    """
    line = " ".join(text.split())
    short = line[: int(width) + 1]
    if short == line and font.getlength(line) <= width:
        return line
    kept = bisect_right(range(1, len(short) + 1), width, key=lambda n: font.getlength(short[:n] + DOTS))
    return short[:kept].rstrip() + DOTS


def bars(title: str, rows: list[tuple[str, float, str, int]]) -> Image.Image:
    """One panel: ``rows`` of (label, value, value as text, colour index); the longest bar fills the width."""
    font, head = ImageFont.load_default(15), ImageFont.load_default(18)
    image = Image.new("RGB", (WIDTH, PAD * 2 + ROW * (len(rows) + 1)), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((PAD, PAD), fit(title, head, WIDTH - 2 * PAD), INK, font=head)
    most = max((value for _, value, _, _ in rows), default=0) or 1
    room = WIDTH - LABEL - 2 * PAD - VALUE
    for i, (label, value, text, colour) in enumerate(rows):
        y = PAD + ROW * (i + 1) + 4
        draw.text((PAD, y), fit(label, font, LABEL - PAD - 8), INK, font=font)
        length = max(1, round(room * value / most))
        draw.rectangle((LABEL, y + 2, LABEL + length, y + ROW - 8), fill=COLOURS[colour % len(COLOURS)])
        draw.text((LABEL + length + 8, y), fit(text, font, VALUE), FAINT, font=font)
    return image


def profile(title: str, stages: list[Stage], parts: list[tuple[str, str, int]]) -> Image.Image:
    """The whole chart. ``parts``: (group, part, bytes). Stages and parts of one group share a colour."""
    groups = list(dict.fromkeys([s.group for s in stages] + [g for g, _, _ in parts]))
    panels = [bars(f"{title}: seconds per stage", [
        (_label(s.group, s.name), s.seconds, f"{s.seconds:.2f} s", groups.index(s.group)) for s in stages
    ])]  # fmt: skip
    stepped = [s for s in stages if s.steps]
    if stepped:
        rows = [
            (_label(s.group, f"{s.name}, step {i + 1}"), t, f"{1000 * t:.0f} ms", groups.index(s.group))
            for s in stepped for i, t in enumerate(s.steps)
        ]  # fmt: skip
        panels.append(bars("milliseconds per step", rows))
    if parts:
        rows = [(_label(g, name), n, f"{n / 2**20:.2f} MiB", groups.index(g)) for g, name, n in parts]
        panels.append(bars("bytes per part", rows))
    image = Image.new("RGB", (WIDTH, sum(p.height for p in panels)), PAPER)
    y = 0
    for panel in panels:
        image.paste(panel, (0, y))
        y += panel.height
    return image


def _label(group: str, name: str) -> str:
    return f"{group}: {name}" if group else name
