"""Says which emoji a picture shows: the nearest of 200 training emoji, compared as 32 x 32 thumbnails.

The thumbnails are shipped as one sheet per style, `SHEET` to a row in the order of references/names.json, so that
anyone can look at what the figures compare with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..reading import picture as pictures
from ..writing import whole
from . import REFERENCES

SIDE, SHEET = 32, 20
NAMES = REFERENCES["noto"].with_name("names.json")


@dataclass(frozen=True)
class References:
    """``names``: every caption of each reference; ``thumbnails`` (n, SIDE, SIDE, 3) float32 in [0, 1]."""

    names: tuple[tuple[str, ...], ...]
    thumbnails: np.ndarray

    def nearest(self, picture: np.ndarray) -> int:
        """The row of the reference closest to ``picture`` (H, W, 3) in [0, 1], by mean squared difference."""
        small = thumbnail(picture)
        return int(((self.thumbnails - small) ** 2).mean((1, 2, 3)).argmin())

    def recognised(self, picture: np.ndarray, caption: str) -> bool:
        """Whether the nearest reference is one that ``caption`` names."""
        return caption in self.names[self.nearest(picture)]


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) in [0, 1] -> (SIDE, SIDE, 3), box-filtered."""
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255


def load(style: str = "noto", folder: Path = NAMES.parent) -> References:
    """The references of ``style``, "noto" or "twemoji", as `save` wrote them."""
    names = json.loads((folder / NAMES.name).read_text(encoding="utf-8"))
    sheet = np.asarray(pictures.read(folder / REFERENCES[style].name), np.float32) / 255
    rows = sheet.shape[0] // SIDE
    cells = sheet.reshape(rows, SIDE, SHEET, SIDE, 3).swapaxes(1, 2).reshape(rows * SHEET, SIDE, SIDE, 3)
    return References(tuple(tuple(n) for n in names), cells[: len(names)])


def save(folder: Path, names: list[tuple[str, ...]], pictures: dict[str, np.ndarray]) -> None:
    """Writes names.json and one sheet per style; ``pictures``: style -> (n, H, W, 3) uint8."""
    whole.text(folder / NAMES.name, json.dumps([list(n) for n in names], indent=0) + "\n")
    for style, stack in pictures.items():
        cells = np.stack([thumbnail(p / 255) for p in stack])
        rows = -(-len(cells) // SHEET)
        sheet = np.ones((rows * SHEET, SIDE, SIDE, 3), np.float32)
        sheet[: len(cells)] = cells
        sheet = sheet.reshape(rows, SHEET, SIDE, SIDE, 3).swapaxes(1, 2).reshape(rows * SIDE, SHEET * SIDE, 3)
        image = Image.fromarray((sheet * 255).round().astype(np.uint8))
        whole.picture(folder / REFERENCES[style].name, image, optimize=True)
