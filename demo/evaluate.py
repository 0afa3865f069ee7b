"""The demo model's figures and contact sheet: reconstruction, and how often the drawn emoji is the captioned one."""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image

from ..metrics.images import psnr
from . import dataset, recognise

REFERENCES = 200
STYLED = 32  # the first so many references are what the flat-style LoRA learns
GUIDANCE, STEPS, FEW = 3.0, 25, 4
# Subjects that the command line and the workflows use: always among the references.
NAMED = (
    "red apple",
    "fox face",
    "rocket",
    "sunflower",
    "hot beverage",
    "octopus",
    "cactus",
    "pizza",
    "guitar",
    "sailboat",
)


def choose(emoji: list[dataset.Emoji], seed: int = 0) -> list[int]:
    """Rows of the 200 reference emoji: the named ones, then a seeded draw."""
    named = [next(i for i, e in enumerate(emoji) if name in e.captions) for name in NAMED]
    rest = [i for i in range(len(emoji)) if i not in named]
    return named + sorted(random.Random(seed).sample(rest, REFERENCES - len(named)))


@torch.no_grad()
def reconstruction(vae, pictures: torch.Tensor) -> float:
    """Mean PSNR in dB of the autoencoder over ``pictures`` (n, 3, H, W) in [-1, 1], compared in [0, 1]."""
    out = []
    for batch in pictures.split(32):
        batch = batch.to(vae.device)
        again = vae.decode(vae.encode(batch).latents).sample.clamp(-1, 1)
        pairs = zip(batch.cpu().numpy(), again.cpu().numpy(), strict=True)
        out += [psnr((a + 1) / 2, (b + 1) / 2) for a, b in pairs]
    return float(np.mean(out))


def draw(pipe, prompts: list[str], steps: int, cfg: float, batch: int = 25, more=lambda _rows: {}) -> np.ndarray:
    """(n, H, W, 3) pictures in [0, 1]; picture i starts from the noise of seed i. ``more(rows)``: further arguments for
    the pipeline's call that draws those rows.
    """
    side = pipe.unet.config.sample_size
    out = []
    for start in range(0, len(prompts), batch):
        texts = prompts[start : start + batch]
        gens = [torch.Generator().manual_seed(start + i) for i in range(len(texts))]
        noise = torch.cat([torch.randn(1, 4, side, side, generator=g) for g in gens]).to(pipe.device, pipe.unet.dtype)
        values = {"latents": noise, "generator": gens, **more(slice(start, start + batch))}
        done = pipe(prompt=texts, num_inference_steps=steps, guidance_scale=cfg, output_type="np", **values)
        out.append(done.images)
    return np.concatenate(out)


def share(references: recognise.References, pictures: np.ndarray, rows: list[int]) -> float:
    """How often picture i's nearest reference is row ``rows[i]``."""
    return float(np.mean([references.nearest(p) == r for p, r in zip(pictures, rows, strict=False)]))


def sheet(stacks: list[np.ndarray], columns: int = 16, side: int = 64) -> Image.Image:
    """Stacks of pictures (n, H, W, 3) in [0, 1], one below the other, ``columns`` to a row, ``side`` pixels each."""
    rows = -(-len(stacks[0]) // columns)
    out = Image.new("RGB", (columns * side, len(stacks) * rows * side), "white")
    for k, stack in enumerate(stacks):
        for i, picture in enumerate(stack):
            cell = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
            place = (i % columns) * side, (k * rows + i // columns) * side
            out.paste(cell.resize((side, side), Image.Resampling.LANCZOS), place)
    return out
