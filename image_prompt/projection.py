"""From an image's CLIP features to tokens that a UNet's cross-attention can read: IP-Adapter's image projections.

Key names are those of the published files, under ``image_proj.``; ``e`` is the width of the features, ``C`` the width
of the model's text, ``T`` the number of tokens:

    Linear     image_embeds (B, e)          -> T tokens   proj (T C, e), norm (C)
    Mlp        image_embeds (B, e)          -> T tokens   proj.0, proj.2 ... (the last T C rows), norm (C); GELU between
    Patches    hidden states (B, P, e)      -> P tokens   proj.0 (e, e), proj.2 (C, e), proj.3 (norm)
    Resampler  hidden states (B, P, e)      -> T tokens   latents (1, T, d), proj_in, layers.*, proj_out, norm_out

Hidden states are the penultimate ones.
Source: Ye et al., IP-Adapter, arXiv 2308.06721, and the files of h94/IP-Adapter: Linear is ip-adapter_sd15, Patches is
ip-adapter-full-face, Resampler is ip-adapter-plus. Mlp is a row of a published comparison of its projections.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

EMBEDS, HIDDEN = "image_embeds", "penultimate_hidden_states"  # as ComfyUI's CLIP_VISION output names them
HEAD = 64  # channels of a resampler's attention head, in every published file

Shapes = Mapping[str, tuple[int, ...]]


class Linear(nn.Module):
    """One linear, cut into tokens, normalised."""

    kind, reads = "linear", EMBEDS

    def __init__(self, width: int, context: int, tokens: int = 4, device=None):
        super().__init__()
        self.width, self.context, self.tokens = width, context, tokens
        self.proj = nn.Linear(width, tokens * context, device=device)
        self.norm = nn.LayerNorm(context, device=device)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(features).reshape(len(features), self.tokens, self.context))


class Mlp(nn.Module):
    """Linears with GELU between them, cut into tokens, normalised."""

    kind, reads = "MLP", EMBEDS

    def __init__(self, width: int, hidden: tuple[int, ...], context: int, tokens: int = 4, device=None):
        super().__init__()
        self.width, self.context, self.tokens = width, context, tokens
        sizes = (width, *hidden, tokens * context)
        steps: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            steps += [nn.Linear(inputs, outputs, device=device), nn.GELU()]
        self.proj = nn.Sequential(*steps[:-1])
        self.norm = nn.LayerNorm(context, device=device)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(features).reshape(len(features), self.tokens, self.context))


class Patches(nn.Module):
    """One token for each of the tower's own: the class token and every patch."""

    kind, reads, tokens = "per patch", HIDDEN, None

    def __init__(self, width: int, context: int, device=None):
        super().__init__()
        self.width, self.context = width, context
        self.proj = nn.Sequential(
            nn.Linear(width, width, device=device),
            nn.GELU(),
            nn.Linear(width, context, device=device),
            nn.LayerNorm(context, device=device),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.proj(features)


class _Perceiver(nn.Module):
    """T latents look at the image's tokens and at themselves."""

    def __init__(self, dim: int, inner: int, device=None):
        super().__init__()
        self.heads = inner // HEAD
        self.norm1, self.norm2 = nn.LayerNorm(dim, device=device), nn.LayerNorm(dim, device=device)
        self.to_q = nn.Linear(dim, inner, bias=False, device=device)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False, device=device)
        self.to_out = nn.Linear(inner, dim, bias=False, device=device)

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat([x, latents], 1)).chunk(2, -1)
        return self.to_out(attend(self.to_q(latents), k, v, self.heads))


class Resampler(nn.Module):
    """Learned latents that gather the image's tokens through a few layers of attention."""

    kind, reads = "resampler", HIDDEN

    def __init__(
        self, width: int, context: int, tokens: int, dim: int, layers: tuple[tuple[int, int], ...], device=None
    ):
        """``layers``: (inner width of the attention, inner width of the feed-forward) of each."""
        super().__init__()
        self.width, self.context, self.tokens = width, context, tokens
        self.latents = nn.Parameter(torch.randn(1, tokens, dim, device=device) / dim**0.5)
        self.proj_in = nn.Linear(width, dim, device=device)
        self.layers = nn.ModuleList(
            nn.ModuleList([
                _Perceiver(dim, inner, device),
                nn.Sequential(
                    nn.LayerNorm(dim, device=device),
                    nn.Linear(dim, wide, bias=False, device=device),
                    nn.GELU(),
                    nn.Linear(wide, dim, bias=False, device=device),
                ),
            ])
            for inner, wide in layers
        )  # fmt: skip
        self.proj_out = nn.Linear(dim, context, device=device)
        self.norm_out = nn.LayerNorm(context, device=device)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x, latents = self.proj_in(features), self.latents.expand(len(features), -1, -1)
        for attention, feed_forward in self.layers:
            latents = attention(x, latents) + latents
            latents = feed_forward(latents) + latents
        return self.norm_out(self.proj_out(latents))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Multi-head attention of (B, L, N) with (B, T, N): softmax(q kT / sqrt(N / heads)) v."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _linear(shapes: Shapes, device) -> nn.Module | None:
    if "proj.weight" not in shapes or "norm.weight" not in shapes:
        return None
    rows, width = shapes["proj.weight"]
    context = shapes["norm.weight"][0]
    return Linear(width, context, rows // context, device)


def _mlp(shapes: Shapes, device) -> nn.Module | None:
    if "proj.0.weight" not in shapes or "norm.weight" not in shapes:
        return None
    steps = sorted(int(name.split(".")[1]) for name in shapes if name.startswith("proj.") and name.endswith(".weight"))
    rows = [shapes[f"proj.{n}.weight"][0] for n in steps]
    context = shapes["norm.weight"][0]
    return Mlp(shapes["proj.0.weight"][1], tuple(rows[:-1]), context, rows[-1] // context, device)


def _patches(shapes: Shapes, device) -> nn.Module | None:
    if "proj.0.weight" not in shapes or "proj.3.weight" not in shapes:
        return None
    return Patches(shapes["proj.0.weight"][1], shapes["proj.3.weight"][0], device)


def _resampler(shapes: Shapes, device) -> nn.Module | None:
    if "latents" not in shapes or "proj_in.weight" not in shapes or "proj_out.weight" not in shapes:
        return None
    layers, n = [], 0
    while f"layers.{n}.0.to_q.weight" in shapes and f"layers.{n}.1.1.weight" in shapes:
        layers.append((shapes[f"layers.{n}.0.to_q.weight"][0], shapes[f"layers.{n}.1.1.weight"][0]))
        n += 1
    _, tokens, dim = shapes["latents"]
    width, context = shapes["proj_in.weight"][1], shapes["proj_out.weight"][0]
    return Resampler(width, context, tokens, dim, tuple(layers), device)


def projection(shapes: Shapes, device=None) -> nn.Module:
    """The projection that has these keys and shapes (names without ``image_proj.``); first match wins.

    Raises ValueError when none does.
    """
    for recognise in (_linear, _mlp, _patches, _resampler):
        found = recognise(shapes, device)
        if found is not None:
            return found
    names = ", ".join(sorted(shapes)[:6])
    raise ValueError(f"image_proj has the keys {names}: neither a linear, an MLP, a per-patch one nor a resampler")
