"""The loss of a run as a picture: every step in grey, their running mean in blue."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

SIZE = (640, 360)
LEFT, TOP, RIGHT, BOTTOM = 64, 36, 16, 32
GREY, BLUE, INK, LINE = "#c9ced6", "#2563eb", "#1f2937", "#e5e7eb"
TICKS = 4


def loss_chart(losses: Sequence[float], title: str, total: int | None = None) -> Image.Image:
    """RGB picture of ``losses``, on an axis of ``total`` steps."""
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, 10), title, fill=INK)
    total, low, high = max(total or 0, len(losses), 2), 0.0, max([*losses, 1e-12]) * 1.05
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM

    def at(step: int, value: float) -> tuple[float, float]:
        return LEFT + step / (total - 1) * width, TOP + (1 - (value - low) / (high - low)) * height

    for i in range(TICKS + 1):
        value = low + (high - low) * i / TICKS
        y = at(0, value)[1]
        draw.line([(LEFT, y), (SIZE[0] - RIGHT, y)], fill=LINE)
        draw.text((8, y - 6), f"{value:.3g}", fill=INK)
    draw.text((LEFT, SIZE[1] - 22), "step 1", fill=INK)
    draw.text((SIZE[0] - RIGHT - 40, SIZE[1] - 22), str(total), fill=INK)
    for values, colour, thick in ((losses, GREY, 1), (smooth(losses), BLUE, 2)):
        points = [at(i, v) for i, v in enumerate(values)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=thick)
    return image


def smooth(losses: Sequence[float]) -> list[float]:
    """Exponential running mean over about a twentieth of the steps, corrected for its start."""
    keep = 1 - 1 / max(2.0, len(losses) / 20)
    out, mean, weight = [], 0.0, 0.0
    for value in losses:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
