"""A folder of pictures with captions as batches of latents.

captions   ``<picture>.txt`` beside it; else its line in a .jsonl (``file_name``; ``text`` or ``caption``) or .csv (the
           same columns) of the folder
buckets    widths and heights, multiples of ``step``, of about ``side``^2 pixels, at most 2 : 1; each picture is scaled
           and cropped at its middle to the bucket of the nearest shape, and a batch comes from one bucket
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_TEXT, MAX_TABLE = 2**16, 2**26
MAX_PIXELS = 2**26
WIDEST = 2.0


@dataclass(frozen=True)
class Example:
    """One picture of a folder."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Sample:
    """One picture ready to train on: latent (C, h, w), the condition its caption means, and the empty caption's."""

    latent: Tensor
    cond: object
    empty: object


def examples(folder: Path) -> list[Example]:
    """The captioned pictures directly in ``folder``, by name. Raises ValueError when there are none, or when a picture
    has no caption.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder.name}: there is no such folder. Put pictures with captions into one")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and p.is_file())
    if not files:
        raise ValueError(f"{folder.name}: there are no pictures in it ({', '.join(ENDINGS)}). Put some there")
    table = _tables(folder)
    found = [Example(p, _caption(p, table)) for p in files]
    bare = [e.path.name for e in found if not e.caption]
    if bare:
        raise ValueError(
            f"{folder.name}: {len(bare)} of {len(found)} pictures have no caption, {bare[0]} first. Write it into "
            f"{Path(bare[0]).with_suffix('.txt')} beside it, or into a .jsonl or .csv with file_name and text"
        )
    return found


def _caption(path: Path, table: dict[str, str]) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        with beside.open(encoding="utf-8", errors="replace") as f:
            return " ".join(f.read(MAX_TEXT).split())
    return " ".join(table.get(path.name, "").split())


def _tables(folder: Path) -> dict[str, str]:
    """file name -> caption from every .jsonl and .csv of the folder."""
    out = {}
    for path in sorted(folder.iterdir()):
        rows = READERS.get(path.suffix.lower())
        if rows is None or not path.is_file():
            continue
        if path.stat().st_size > MAX_TABLE:
            raise ValueError(f"{path.name} is larger than 64 MiB; a caption list is not")
        for row in rows(path):
            name, text = row.get("file_name"), row.get("text") or row.get("caption")
            if isinstance(name, str) and isinstance(text, str):
                out[name] = text
    return out


def _jsonl(path: Path) -> Iterator[dict]:
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise ValueError(f"{path.name}, line {number}: not JSON. Write one object a line") from e
        if isinstance(row, dict):
            yield row


def _csv(path: Path) -> Iterable[dict]:
    return list(csv.DictReader(path.read_text(encoding="utf-8-sig", errors="replace").splitlines()))


READERS = {".jsonl": _jsonl, ".csv": _csv}


def buckets(side: int) -> list[tuple[int, int]]:
    """(width, height) of every bucket for pictures of about ``side``^2 pixels."""
    step = 64 if side >= 512 else 32
    out = []
    for width in range(step, int(side * math.sqrt(WIDEST)) + step, step):
        height = round(side * side / width / step) * step
        if height and max(width / height, height / width) <= WIDEST:
            out.append((width, height))
    return out or [(side, side)]


def fitted(path: Path, side: int) -> Tensor:
    """(3, H, W) in [-1, 1]: the picture in its bucket, transparent parts white. Raises ValueError for a file that is no
    picture, or is one of more than 67 megapixels.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{path.name} has {image.width} x {image.height} pixels. Make it smaller")
            picture = image.convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path.name} cannot be read as a picture. Save it again as PNG or JPEG") from e
    flat = Image.new("RGB", picture.size, "white")
    flat.paste(picture, mask=picture)
    ratio = math.log(flat.width / flat.height)
    width, height = min(buckets(side), key=lambda b: (abs(math.log(b[0] / b[1]) - ratio), abs(b[0] * b[1] - side**2)))
    scale = max(width / flat.width, height / flat.height)
    size = max(width, round(flat.width * scale)), max(height, round(flat.height * scale))
    scaled = flat.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    array = np.asarray(scaled.crop((left, top, left + width, top + height)))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float().div(127.5).sub(1)


def split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """(rows to train on, rows held out): ``share`` of ``count`` rows, at least one of two or more unless it is 0."""
    held = min(count - 1, max(1, round(count * share))) if share > 0 else 0
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held:]), sorted(order[:held])


class Batches:
    """Draws batches of one latent shape each; a draw is a function of the generator alone."""

    def __init__(self, samples: Sequence[Sample]):
        shapes: dict[tuple[int, ...], list[Sample]] = {}
        for sample in samples:
            shapes.setdefault(tuple(sample.latent.shape), []).append(sample)
        self.groups = list(shapes.values())
        self.sizes = torch.tensor([len(g) for g in self.groups], dtype=torch.float32)

    def __call__(self, count: int, generator: torch.Generator) -> list[Sample]:
        """``count`` pictures, or all of their bucket where it holds fewer."""
        group = self.groups[int(torch.multinomial(self.sizes, 1, generator=generator))]
        order = torch.randperm(len(group), generator=generator)[:count]
        return [group[i] for i in order.tolist()]
