"""Contact sheets: pictures in a labelled grid."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAD, HEAD, LABEL = 8, 34, 84
INK, PAPER = (32, 33, 36), (255, 255, 255)


def to_image(picture: np.ndarray) -> Image.Image:
    """(H, W, 3) in [0, 1] -> PIL."""
    return Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))


def contact(title: str, rows: list[tuple[str, list[np.ndarray]]]) -> Image.Image:
    """``rows``: (label, pictures of one size). Labels stand left of each row."""
    height, width = rows[0][1][0].shape[:2]
    columns = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (LABEL + columns * (width + PAD) + PAD, HEAD + len(rows) * (height + PAD) + PAD), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((PAD, PAD), title, INK, font=ImageFont.load_default(16))
    for i, (label, pictures) in enumerate(rows):
        y = HEAD + i * (height + PAD)
        draw.multiline_text((PAD, y + height // 2 - 16), label, INK, font=ImageFont.load_default(14))
        for j, picture in enumerate(pictures):
            sheet.paste(to_image(picture), (LABEL + j * (width + PAD), y))
    return sheet
