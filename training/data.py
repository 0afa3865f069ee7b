"""A folder of pictures with captions as batches of latents.

captions   ``<picture>.txt`` beside it; else its line in a .jsonl (``file_name``; ``text`` or ``caption``) or .csv (the
           same columns) of the folder, read by the rules of reading/textfile.py
pictures   read by the rules of reading/picture.py
buckets    widths and heights, multiples of ``step``, of about ``side``^2 pixels, at most 2 : 1; the middle of each
           picture is scaled to the bucket of the nearest shape, and a batch comes from one bucket
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..reading import picture, textfile
from ..reading.names import place, shown

MAX_TABLE = 2**26
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
        raise ValueError(f"{shown(folder.name)}: there is no such folder. Put pictures with captions into one")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in picture.ENDINGS and p.is_file())
    if not files:
        raise ValueError(
            f"{shown(folder.name)}: there are no pictures in it ({', '.join(picture.ENDINGS)}). Put some there"
        )
    beside = {p: p.with_suffix(".txt") for p in files if p.with_suffix(".txt").is_file()}
    table = _tables(folder, {p.name for p in files if p not in beside})
    found = [Example(p, textfile.caption_file(beside[p]) if p in beside else table.get(p.name, "")) for p in files]
    bare = [e.path.name for e in found if not e.caption]
    if bare:
        first, text = shown(bare[0]), shown(Path(bare[0]).with_suffix(".txt"))
        raise ValueError(
            f"{shown(folder.name)}: {len(bare)} of {len(found)} pictures have no caption, {first} first. Write it into "
            f"{text} beside it, or into a .jsonl or .csv with file_name and text"
        )
    return found


def _tables(folder: Path, wanted: set[str]) -> dict[str, str]:
    """file name -> caption of the ``wanted`` ones, from every .jsonl and .csv of the folder."""
    out: dict[str, str] = {}
    tables = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in READERS and p.is_file()] if wanted else []
    for path in tables:
        for number, row in READERS[path.suffix.lower()](textfile.read(path, MAX_TABLE), path.name):
            where = place(path.name, number)
            if not isinstance(row, dict):
                raise ValueError(f"{where}: it is no object. Write file_name and text into one on each line")
            name, text = row.get("file_name"), row.get("text")
            text = row.get("caption") if text in (None, "") else text
            if isinstance(name, str) and name in wanted and text is not None:
                out[name] = textfile.caption(text, where)
    return out


READERS = {".jsonl": textfile.values, ".csv": textfile.rows}


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
    """(3, H, W) in [-1, 1]: the middle of a picture in its bucket. Raises ValueError for what is no picture."""

    def bucket(width: int, height: int) -> tuple[int, int]:
        ratio = math.log(width / height)
        return min(buckets(side), key=lambda b: (abs(math.log(b[0] / b[1]) - ratio), abs(b[0] * b[1] - side**2)))

    array = np.asarray(picture.fitted(path, bucket))
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
