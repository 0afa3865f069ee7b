"""The demo's vision tower: a small CLIP picture half, trained against the demo's own frozen text encoder.

    f = unit(tower(picture))      t = unit(P pooled(text))      P: the text projection, trained with the tower
    loss = CE(s f t^T: which emoji of all) / 2 + CE(s t f^T: which picture of the batch) / 2
         + 0.5 CE(s f f'^T: which other view of the same picture)

The first two are CLIP's (2103.00020), with the texts of all emoji as negatives, because the text encoder is frozen and
its features are a table. The third (SimCLR, 2002.05709) tells the two vendors' pictures of one emoji apart, which share
their captions: without it a picture prompt could not carry a style.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ..training.loop import Plan, train
from . import TEXT_PROJECTION, VISION, dataset, parts

TOWER = Plan("tower", steps=1000, batch=192, lr=1e-3, warmup=100, weight_decay=0.05, ema=0.995, seed=5)
# CLIP's own, which ComfyUI and transformers assume where a file says nothing.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
STORED = 64  # pictures wait at this size and are sampled down to the tower's
VIEWS, VENDORS = 2, 2
SAME_PICTURE = 0.5  # weight of the third term
SCALE, MOST = 1 / 0.07, 100.0  # CLIP's first and greatest logit scale


def normalised(pictures: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1] -> the tower's input."""
    mean, deviation = (torch.tensor(v, device=pictures.device).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return (pictures - mean) / deviation


def resized(pictures: torch.Tensor, side: int = parts.VISION["image_size"]) -> torch.Tensor:
    """Square (B, 3, H, W) in [0, 1] as ComfyUI's CLIP preprocessing resizes them, still in [0, 1]."""
    small = F.interpolate(pictures, size=(side, side), mode="bicubic", antialias=True)
    return (255 * small).clamp(0, 255).round() / 255


def augmented(pictures: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Views (B, 3, side, side) of stored pictures (B, 3, H, W) in [0, 1]: mirrored, turned, cropped or shrunk on white,
    brighter or darker, more or less colourful, noisy.
    """
    n, side = len(pictures), parts.VISION["image_size"]

    def draw(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=g)

    mirror = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    zoom, angle = draw(0.7, 1.15), draw(-0.25, 0.25)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    shift = draw(-0.15, 0.15), draw(-0.15, 0.15)
    theta = torch.stack([cos * mirror, -sin, shift[0], sin * mirror, cos, shift[1]], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, [n, 3, side, side], align_corners=False)
    views = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    grey = views.mean(1, keepdim=True)
    colourful, contrast, light = (draw(*r).view(-1, 1, 1, 1) for r in ((0.7, 1.3), (0.85, 1.15), (-0.08, 0.08)))
    views = 0.5 + contrast * (grey + colourful * (views - grey) - 0.5) + light
    noise = torch.randn(views.shape, generator=g) * draw(0, 0.04).view(-1, 1, 1, 1)
    return (views + noise).clamp(0, 1)


@torch.no_grad()
def pooled(text, tokenizer, texts: list[str], device: str) -> torch.Tensor:
    """(len(texts), 128): the text encoder's state at the end mark, unprojected."""
    chunks = [texts[i : i + 256] for i in range(0, len(texts), 256)]
    return torch.cat([text(parts.token_ids(tokenizer, c).to(device)).pooler_output for c in chunks])


class Texts:
    """The pooled features of everything that training may call each emoji, and a draw of one text an emoji."""

    def __init__(self, emoji: list[dataset.Emoji], text, tokenizer, device: str):
        each = [sorted({p.format(c=c, s=e.kind) for p in dataset.PHRASES for c in e.captions}) for e in emoji]
        self.features = pooled(text, tokenizer, [t for texts in each for t in texts], device)
        self.counts = torch.tensor([len(t) for t in each])
        self.starts = self.counts.cumsum(0) - self.counts

    def __call__(self, g: torch.Generator) -> torch.Tensor:
        """(emoji, 128) features, a text of each emoji."""
        drawn = (torch.rand(len(self.counts), generator=g) * self.counts).long()
        return self.features[(self.starts + drawn).to(self.features.device)]


def contrast(seen: torch.Tensor, texts: torch.Tensor, pick: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The loss above. ``seen`` (views, vendors, n, d) and ``texts`` (emoji, d) are unit; ``pick`` (n,): which emoji."""
    d = seen.shape[-1]
    flat = seen.reshape(-1, d)
    which = pick.repeat(seen.shape[0] * seen.shape[1])
    to_text = F.cross_entropy(scale * flat @ texts.t(), which)
    logits = (scale * texts[pick] @ flat.t()).log_softmax(1)
    mine = (pick[:, None] == which[None]).to(logits.dtype)
    to_picture = -((logits * mine).sum(1) / mine.sum(1)).mean()
    one, two = (view.reshape(-1, d) for view in (seen[0], seen[1]))
    pairs, rows = scale * one @ two.t(), torch.arange(len(one), device=one.device)
    same = (F.cross_entropy(pairs, rows) + F.cross_entropy(pairs.t(), rows)) / 2
    return (to_text + to_picture) / 2 + SAME_PICTURE * same


def learn(texts: Texts, pictures: torch.Tensor, work: Path, device: str):
    """(tower, text projection (d, d), seconds). ``pictures`` (vendors, n, 3, H, W) in [-1, 1], row i of each is emoji i
    of ``texts``.
    """
    torch.manual_seed(TOWER.seed)
    model = parts.vision_tower().to(device).train()
    width = texts.features.shape[1]
    projection = torch.nn.Linear(width, width, bias=False).to(device)
    log_scale = torch.nn.Parameter(torch.tensor(SCALE, device=device).log())
    stored = torch.stack([resized((p + 1) / 2, STORED) for p in pictures])
    n = TOWER.batch // (VIEWS * VENDORS)

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        pick = torch.randperm(stored.shape[1], generator=g)[:n]
        same = stored[:, pick].flatten(0, 1)
        views = torch.cat([augmented(same, g) for _ in range(VIEWS)]).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            seen = model(pixel_values=normalised(views)).image_embeds.float()
        called = F.normalize(projection(texts(g)), dim=-1)
        scale = log_scale.exp().clamp(max=MOST)
        return contrast(F.normalize(seen, dim=-1).view(VIEWS, VENDORS, n, -1), called, pick.to(device), scale)

    seconds = train(TOWER, [*model.parameters(), *projection.parameters(), log_scale], loss, work).seconds
    return model.eval(), projection.weight.detach(), seconds


def load(folder: Path = VISION):
    """(tower in float32, text projection (128, 128)) from the shipped file, or another folder's."""
    weights = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    projection, model = weights.pop(TEXT_PROJECTION), parts.vision_tower()
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False), projection


@torch.no_grad()
def embeddings(model, pictures: torch.Tensor) -> torch.Tensor:
    """(n, 128) projected features of square pictures (n, 3, H, W) in [0, 1], as ComfyUI's CLIP_VISION computes them."""
    device = next(model.parameters()).device
    batches = (normalised(resized(p)).to(device) for p in pictures.split(128))
    return torch.cat([model(pixel_values=b).image_embeds.float().cpu() for b in batches])


def first(queries: torch.Tensor, answers: torch.Tensor, right: list[int]) -> float:
    """How often the row of ``answers`` nearest to query i, by cosine, is ``right[i]``."""
    nearest = (F.normalize(queries, dim=-1) @ F.normalize(answers, dim=-1).t()).argmax(1)
    return float((nearest == torch.tensor(right)).float().mean())


def retrieval(model, projection: torch.Tensor, emoji, pictures: torch.Tensor, text, tokenizer) -> dict[str, float]:
    """Top-1 shares among all emoji, mean over vendors where there are two. ``pictures`` (vendors, n, 3, H, W) in
    [-1, 1]. Held out: captions that no training saw, and new draws of the augmentation.
    """
    device, rows = str(projection.device), list(range(len(emoji)))
    clean = [(p + 1) / 2 for p in pictures]
    seen = [embeddings(model, p) for p in clean]
    again = [embeddings(model, augmented(resized(p, STORED), torch.Generator().manual_seed(-1 - k)))
             for k, p in enumerate(clean)]  # fmt: skip
    unseen = [(i, c) for i, e in enumerate(emoji) for c in e.held_out]

    def called(texts: list[str]) -> torch.Tensor:
        return (pooled(text, tokenizer, texts, device) @ projection.t()).cpu()

    names, new = called([e.captions[0] for e in emoji]), called([c for _, c in unseen])
    shares = {
        "caption_to_picture": [first(names, s, rows) for s in seen],
        "held_out_caption_to_picture": [first(new, s, [i for i, _ in unseen]) for s in seen],
        "picture_to_caption": [first(s, names, rows) for s in seen],
        "augmented_picture_to_caption": [first(a, names, rows) for a in again],
        "augmented_picture_to_picture": [first(a, torch.cat(seen), [i + k * len(emoji) for i in rows])
                                         for k, a in enumerate(again)],
    }  # fmt: skip
    return {f"top1_{name}": round(sum(v) / len(v), 4) for name, v in shares.items()}
