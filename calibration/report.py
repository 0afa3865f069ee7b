"""What a calibration did, for people: a markdown table, a picture of the errors, an HTML page of both."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from ..quant.calib.allocate import stored_bytes
from ..quant.calib.engine import Layer
from ..quant.calib.presets import PRESETS
from ..quant.calib.solve import HELD_BACK
from ..quant.schemes import AWQ, KEEP, SVDQUANT

WIDTH, HEIGHT, PAD, LABEL = 1024, 420, 16, 64
INK, FAINT, PAPER = (32, 33, 36), (154, 160, 166), (255, 255, 255)
COLOURS = {"calibrated": (66, 133, 244), "data-free": (234, 134, 0), "promoted": (171, 71, 188)}


def outcome(layer: Layer) -> str:
    """calibrated, data-free (calibration was no better), or promoted (to 8 or 16 bits)."""
    if layer.plan.reason.startswith("promoted"):
        return "promoted"
    return "calibrated" if layer.solved.calibrated else "data-free"


def unreached(layers: Mapping[str, Layer], preset: str) -> list[str]:
    """The layers that no forward pass reached, though ``preset`` asks what each is fed."""
    return [n for n, x in layers.items() if not x.tokens] if PRESETS[preset].needs_data else []


def _too_few(layers: Mapping[str, Layer]) -> list[str]:
    ours = (SVDQUANT.id, AWQ.id)  # the others are not calibrated
    return [n for n, x in layers.items() if 0 < x.tokens < HELD_BACK and x.plan.scheme in ours]


def totals(layers: Mapping[str, Layer]) -> dict:
    """Counts, bytes against 16 bits, and the geometric mean of the measured errors. ``unsigned``: layers whose
    activations are, as their input allowed.
    """
    rows = list(layers.values())
    errors = [x.solved.error for x in rows if x.solved.error > 0]
    free = [x.solved.data_free for x in rows if x.solved.error > 0 and x.solved.data_free > 0]
    return {
        "layers": len(rows),
        **{name: sum(outcome(x) == name for x in rows) for name in COLOURS},
        "unsigned": sum(x.plan.act_unsigned for x in rows),
        "bytes": sum(stored_bytes(x.plan, x.shape) for x in rows),
        "bytes_16bit": sum(2 * x.shape[0] * x.shape[1] for x in rows),
        "error": _mean(errors),
        "data_free_error": _mean(free),
        "seconds": sum(x.seconds for x in rows),
    }


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def summary(layers: Mapping[str, Layer], preset: str) -> str:
    """What it cost, what it gave, and by name every layer that it knows nothing about: some sentences."""
    t = totals(layers)
    if not t["layers"]:
        return "Nothing was quantized."
    size = f"{t['bytes'] / 2**20:.1f} MiB, {t['bytes'] / t['bytes_16bit']:.2f}x of 16 bits"
    text = f"{t['layers']} layers by preset {preset} in {t['seconds']:.0f} s: {size}."
    blind, few = unreached(layers, preset), _too_few(layers)
    if t["calibrated"]:
        kept = t["data-free"] - sum(outcome(layers[n]) == "data-free" for n in (*blind, *few))
        text += (
            f" {t['calibrated']} are calibrated, {kept} kept the data-free weight because it was no worse on "
            f"held-back tokens, {t['promoted']} were promoted. Relative output error {t['error']:.4f}"
            f" (data-free {t['data_free_error']:.4f})."
        )
    if t["unsigned"]:
        text += f" {t['unsigned']} have unsigned activations, since their input ends just below zero."
    if blind:
        text += f" {len(blind)} were never run, so nothing is known of their input: {', '.join(blind)}."
    if few:
        text += f" {len(few)} were fed fewer than {HELD_BACK} tokens, too few to calibrate: {', '.join(few)}."
    return text


def table(layers: Mapping[str, Layer], preset: str) -> str:
    """Markdown: the summary, then a row per layer, worst error first."""
    lines = [summary(layers, preset), "", "| layer | stored as | rank | error | data-free | kept | KiB | activations |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    blind = set(unreached(layers, preset))
    for x in sorted(layers.values(), key=lambda x: -_size(x.solved.error)):
        stored = "16 bits" if x.plan.scheme == KEEP else x.plan.scheme
        kib = stored_bytes(x.plan, x.shape) / 1024
        error, free = _number(x.solved.error), _number(x.solved.data_free)
        kept = "no data" if x.name in blind else outcome(x)
        row = f"| {x.name} | {stored} | {x.plan.rank or '-'} | {error} | {free} | {kept} | {kib:.1f} |"
        lines.append(f"{row} {'unsigned' if x.plan.act_unsigned else '-'} |")
    return "\n".join(lines)


def _size(error: float) -> float:
    return error if error == error else -1.0


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.4f}"


def chart(layers: Mapping[str, Layer], title: str) -> Image.Image:
    """One bar per layer in the model's order, log scale; a tick where the data-free error was."""
    rows = [x for x in layers.values() if x.solved.error > 0]
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((PAD, PAD), title, INK, font=ImageFont.load_default(18))
    if not rows:
        draw.text(
            (PAD, HEIGHT // 2), "no layer was measured: the preset uses no data", FAINT, font=ImageFont.load_default(15)
        )
        return image
    values = [v for x in rows for v in (x.solved.error, x.solved.data_free) if v > 0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    top, bottom = 56, HEIGHT - 44

    def y_of(value: float) -> float:
        return bottom - (math.log10(value) - low) / max(1, high - low) * (bottom - top)

    for power in range(low, high + 1):
        y = y_of(10**power)
        draw.line((LABEL, y, WIDTH - PAD, y), fill=(232, 234, 237))
        draw.text((PAD, y - 8), f"1e{power}", FAINT, font=ImageFont.load_default(13))
    step = (WIDTH - PAD - LABEL) / len(rows)
    for i, x in enumerate(rows):
        left, right = LABEL + i * step, LABEL + (i + 1) * step - max(0.5, step * 0.2)
        draw.rectangle((left, y_of(x.solved.error), max(left + 1, right), bottom), fill=COLOURS[outcome(x)])
        if x.solved.data_free > 0:
            y = y_of(x.solved.data_free)
            draw.line((left, y, max(left + 1, right), y), fill=INK)
    at = LABEL
    for name, colour in COLOURS.items():
        draw.rectangle((at, HEIGHT - 28, at + 12, HEIGHT - 16), fill=colour)
        draw.text((at + 18, HEIGHT - 32), name, INK, font=ImageFont.load_default(14))
        at += 130
    draw.text((at, HEIGHT - 32), "black tick: data-free error", FAINT, font=ImageFont.load_default(14))
    return image


def page(layers: Mapping[str, Layer], preset: str, title: str) -> str:
    """A self-contained HTML page: the chart and the table."""
    png = io.BytesIO()
    chart(layers, title).save(png, "PNG")
    picture = base64.b64encode(png.getvalue()).decode()
    lines = table(layers, preset).splitlines()
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c.strip())}</td>" for c in line.strip("|").split("|")) + "</tr>"
        for line in lines
        if line.startswith("|") and not line.startswith("|---")
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<style>body{font:15px sans-serif;margin:2em;color:#202124}td{padding:2px 12px;border-bottom:1px "
        "solid #ddd}</style>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(lines[0])}</p>"
        f'<img alt="error of each layer" src="data:image/png;base64,{picture}"><table>{body}</table>'
    )
