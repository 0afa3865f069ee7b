"""The demo model's data: two openly licensed emoji sets with captions, as tensors.

Sources (npm, checked by sha512): ``emoji-datasource-google`` 16.0.0 (Noto emoji, images Apache-2.0) and
``emoji-datasource-twitter`` 16.0.0 (Twemoji, images CC-BY 4.0). Captions come from the package's emoji.json.

Images: 64 x 64 RGBA -> composited on white, resized to 112, a margin of 8 -> (3, 128, 128) uint8.
The margin is one latent wide (factor 8), so no picture touches the border.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import random
import re
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..reading import picture
from ..writing import whole

log = logging.getLogger(__name__)

SIZE, MARGIN = 128, 8
VERSION = "16.0.0"
CATEGORIES = (
    "Smileys & Emotion",
    "Animals & Nature",
    "Food & Drink",
    "Activities",
    "Travel & Places",
    "Objects",
)
# vendor -> integrity string published by the npm registry
PACKAGES = {
    "google": "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    "twitter": "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
}
# What a caption is dressed in during training, so that an expanded prompt is no surprise to the model.
PHRASES = (
    "{c}",
    "{c}",
    "{c}",
    "emoji of {c}",
    "{c} emoji",
    "{c}, {s}",
    "an emoji of {c}, white background",
    "{c}, simple shapes, clean colours, white background",
)
STYLE_TRIGGER = "flat style"


@dataclass(frozen=True)
class Emoji:
    """One picture and everything it is called. ``captions`` are for training, ``held_out`` are never seen."""

    image: str
    captions: tuple[str, ...]
    held_out: tuple[str, ...]
    kind: str


def fetch_package(vendor: str, folder: Path) -> Path:
    """Path of the vendor's npm tarball in ``folder``; downloads it when absent. Raises ValueError on a wrong digest."""
    name = f"emoji-datasource-{vendor}-{VERSION}.tgz"
    path = folder / name
    if not path.exists():
        registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org/").rstrip("/")
        url = f"{registry}/emoji-datasource-{vendor}/-/{name}"
        log.info("downloading %s", url)
        with urllib.request.urlopen(url, timeout=300) as reply:
            whole.data(path, reply.read())
    digest = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != PACKAGES[vendor]:
        raise ValueError(f"{path.name}: sha512 is {digest}, expected {PACKAGES[vendor]}; delete the file and run again")
    return path


def words(name: str) -> str:
    """'SNOW-CAPPED MOUNTAIN' / 'snow_capped_mountain' / 'clock3' -> plain lower-case words."""
    name = re.sub(r"[_\-]+", " ", name.lower())
    name = re.sub(r"(?<=[a-z])(?=\d)", " ", name)
    name = re.sub(r"[^a-z0-9' ]+", " ", name)
    return " ".join(name.split())


def read_emoji(package: Path, hold_out: float = 0.05, seed: int = 0) -> list[Emoji]:
    """The emoji of `CATEGORIES` with their captions, in a fixed order.

    ``hold_out`` is the share of all captions that is kept from training. Only emoji with several captions give one
    away, so every picture is still seen under another name.
    """
    with tarfile.open(package) as tar:
        rows = json.load(tar.extractfile("package/emoji.json"))
    rows = sorted((r for r in rows if r["category"] in CATEGORIES), key=lambda r: r["unified"])
    named = [list(dict.fromkeys([words(r["name"]), *map(words, r["short_names"])])) for r in rows]
    owners: dict[str, int] = {}
    for captions in named:
        for c in captions:
            owners[c] = owners.get(c, 0) + 1
    spare = [(i, c) for i, captions in enumerate(named) if len(captions) > 1 for c in captions if owners[c] == 1]
    random.Random(seed).shuffle(spare)
    wanted = round(hold_out * sum(map(len, named)))
    held: dict[int, str] = {}
    for i, c in spare:
        if len(held) == wanted:
            break
        held.setdefault(i, c)
    out = []
    for i, (row, captions) in enumerate(zip(rows, named, strict=True)):
        seen = tuple(c for c in captions if c != held.get(i))
        out.append(Emoji(row["image"], seen, (held[i],) if i in held else (), words(row["subcategory"])))
    return out


def to_canvas(flat: Image.Image) -> np.ndarray:
    """Picture -> (SIZE, SIZE, 3) uint8 on white with `MARGIN` on every side."""
    inner = SIZE - 2 * MARGIN
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    canvas.paste(flat.resize((inner, inner), Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    return np.asarray(canvas)


def read_images(package: Path, vendor: str, names: list[str]) -> np.ndarray:
    """(len(names), SIZE, SIZE, 3) uint8 pictures of one vendor, in the order of ``names``."""
    wanted = {f"package/img/{vendor}/64/{n}": i for i, n in enumerate(names)}
    out = np.zeros((len(names), SIZE, SIZE, 3), np.uint8)
    found = 0
    with tarfile.open(package) as tar:
        for member in tar:
            i = wanted.get(member.name)
            if i is not None:
                out[i] = to_canvas(picture.decoded(tar.extractfile(member).read(), member.name))
                found += 1
    if found != len(names):
        raise ValueError(f"{package.name}: {found} of {len(names)} pictures found")
    return out


def phrase(emoji: Emoji, rng: random.Random, style: bool = False) -> str:
    """A training caption: one of the emoji's names in one of `PHRASES`; ``style`` adds the LoRA's trigger half the
    time.
    """
    text = rng.choice(PHRASES).format(c=rng.choice(emoji.captions), s=emoji.kind)
    return f"{text}, {STYLE_TRIGGER}" if style and rng.random() < 0.5 else text


def load(folder: Path, seed: int = 0) -> tuple[list[Emoji], dict[str, np.ndarray]]:
    """(emoji, {vendor: pictures (n, SIZE, SIZE, 3) uint8}); cached beside the tarballs."""
    packages = {v: fetch_package(v, folder) for v in PACKAGES}
    emoji = read_emoji(packages["google"], seed=seed)
    cache = folder / f"pictures-{SIZE}-{len(emoji)}.npz"
    if not cache.exists():
        names = [e.image for e in emoji]
        found = {v: read_images(p, v, names) for v, p in packages.items()}
        with whole.whole(cache) as f:
            np.savez(f, **found)
    with np.load(cache) as pictures:
        return emoji, {v: pictures[v] for v in PACKAGES}
