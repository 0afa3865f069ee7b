"""Measures that need a library and weights of someone else. Nothing is downloaded: each says in one sentence what is
missing, and works when it is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's own name in torch's cache
REWARD = ("ImageReward.pt", "med_config.json")


class Missing(RuntimeError):
    """A library or file that a measure needs is not here; the text says which, and how to get it."""


def lpips(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """LPIPS (AlexNet) of (reference, candidate) pairs, (H, W, 3) in [0, 1]; 0 for equal pictures.

    Needs the `lpips` package and torchvision's AlexNet weights in torch's cache. Raises Missing. Source: Zhang 2018.
    """
    for name in ("lpips", "torchvision"):
        if importlib.util.find_spec(name) is None:
            raise Missing(f"LPIPS is left out: the Python package {name} is not installed (pip install {name})")
    file = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not file.is_file():
        raise Missing(f"LPIPS is left out: {ALEXNET} is not in torch's cache of checkpoints (nothing is downloaded)")
    library = _load("LPIPS", "lpips")
    with torch.inference_mode(False), torch.no_grad():
        network = library.LPIPS(net="alex", verbose=False).eval()
        return [float(network(_plus_minus_one(r), _plus_minus_one(c))) for r, c in pairs]


def _load(measure: str, name: str):
    """An installed package. Raises Missing when it does not import: many are made for one version of another."""
    try:
        return importlib.import_module(name)
    except (ImportError, AttributeError, RuntimeError, OSError) as e:
        first = str(e).strip().partition("\n")[0]
        raise Missing(f"{measure} is left out: the Python package {name} does not load here ({first})") from e


def _plus_minus_one(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(picture[..., :3], -1, 0).astype(np.float32).copy())[None] * 2 - 1


def image_reward(prompts: Sequence[str], pictures: Iterable[np.ndarray]) -> list[float]:
    """ImageReward of each picture for its prompt; higher is better.

    Needs the `image-reward` package and its two files in its cache. Raises Missing. Source: Xu et al. 2023.
    """
    if importlib.util.find_spec("ImageReward") is None:
        raise Missing("ImageReward is left out: its Python package is not installed (pip install image-reward)")
    cache = Path(os.path.expanduser("~")) / ".cache" / "ImageReward"
    absent = [name for name in REWARD if not (cache / name).is_file()]
    if absent:
        raise Missing(f"ImageReward is left out: {' and '.join(absent)} not in its cache (nothing is downloaded)")
    from PIL import Image

    model = _load("ImageReward", "ImageReward").load(str(cache / REWARD[0]), med_config=str(cache / REWARD[1]))
    images = (Image.fromarray((np.clip(p, 0, 1) * 255).round().astype(np.uint8)) for p in pictures)
    with torch.no_grad():
        return [float(model.score(p, image)) for p, image in zip(prompts, images, strict=True)]
