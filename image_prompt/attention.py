"""The cross-attentions of a UNet in the order in which IP-Adapter files count them, and what is added to each.

Order: down, then up, then the middle block (diffusers' order of attention processors); inside a part by position. It is
read off the model, under diffusers' names or ComfyUI's, so a UNet of any depth has it: 16 in SD1.5, 70 in SDXL.

    Z = O(Attn(Q, K, V)) + w Attn(Q, K', V')        K' = W_k c, V' = W_v c, c: the image's tokens

(arXiv 2308.06721, eq. 5.) A file counts self-attentions, too, so the n-th cross-attention has the number 2n + 1. Keys
under ``ip_adapter.<number>.``:

    to_k_ip.weight, to_v_ip.weight   (N, C)           W_k, W_v of the image: the published files
    to_k_ip.{down,up}.weight         (r, C), (N, r)   LoRA: W_k = the model's own to_k + up down; to_v_ip likewise
    to_q_ip.{down,up}.weight         (r, N), (N, r)   LoRA of to_q on the image's branch only; optional
    to_out_ip.{down,up}.weight       (r, N), (N, r)   the same for to_out, on what the branch adds

The LoRA names are this pack's: the published ``to_k_lora`` of FaceID files changes the text's branch, which these do
not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .projection import attend

PARTS = {
    "down_blocks": "down", "input_blocks": "down", "up_blocks": "up", "output_blocks": "up", "mid_block": "mid",
    "middle_block": "mid",
}  # fmt: skip
ORDER = ("down", "up", "mid")
BLOCKS = ("all", "style", "composition")
SDXL_CONTEXT = 2048


@dataclass(frozen=True)
class Site:
    """A cross-attention of a model: its module's dotted ``name``, N = ``hidden``, C = ``context``."""

    name: str
    part: str
    hidden: int
    context: int

    @property
    def transformer(self) -> str:
        """The name of the spatial transformer around it, which holds one or more such blocks."""
        return self.name.rsplit(".transformer_blocks.", 1)[0]


def sites(model: nn.Module) -> list[Site]:
    """The cross-attentions of a diffusers or ComfyUI UNet, in IP-Adapter's order; empty for a model without any."""
    found = []
    for name, module in model.named_modules():
        part = PARTS.get(name.split(".", 1)[0])
        if part and name.endswith(".attn2") and hasattr(module, "to_k"):
            found.append(Site(name, part, module.to_k.out_features, module.to_k.in_features))
    numbers = {s.name: [int(n) for n in s.name.split(".") if n.isdigit()] for s in found}
    return sorted(found, key=lambda s: (ORDER.index(s.part), numbers[s.name]))


def chosen(found: list[Site], blocks: str) -> list[Site]:
    """Those of ``found`` that carry style or composition, or all. Source: Wang et al., InstantStyle, arXiv 2404.02733.

    SDXL: style in the second transformer on the way up, composition in the last on the way down. Elsewhere, as its
    authors do for SD1.5 (with a weaker effect): the whole deepest level on the way up, or down with the middle.
    """
    if blocks not in BLOCKS:
        raise ValueError(f"blocks is {blocks!r}; it may be {', '.join(BLOCKS)}")
    if blocks == "all" or not found:
        return found
    part = "up" if blocks == "style" else "down"
    one_way = [s for s in found if s.part == part]
    if not one_way:
        return []
    turn = one_way[0 if blocks == "style" else -1]  # the block next to the middle
    level = [s for s in one_way if s.hidden == turn.hidden]
    if found[0].context == SDXL_CONTEXT:
        names = list(dict.fromkeys(s.transformer for s in level))
        wanted = names[min(1, len(names) - 1)] if blocks == "style" else names[-1]
        return [s for s in level if s.transformer == wanted]
    return level + [s for s in found if blocks == "composition" and s.part == "mid"]


class Full(nn.Linear):
    """A weight of the image's own: x -> W x."""

    adds_to_base = False

    def __init__(self, inputs: int, outputs: int, device=None):
        super().__init__(inputs, outputs, bias=False, device=device)


class Factored(nn.Module):
    """What a LoRA adds to the model's own projection: x -> up down x. Zero when new."""

    adds_to_base = True

    def __init__(self, inputs: int, outputs: int, rank: int, device=None):
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False, device=device)
        self.up = nn.Linear(rank, outputs, bias=False, device=device)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


class ImageAttention(nn.Module):
    """What one cross-attention learns for the image: ``to_k_ip``, ``to_v_ip`` and maybe ``to_q_ip``, ``to_out_ip``."""

    def __init__(self, parts: Mapping[str, nn.Module]):
        super().__init__()
        for name in ("to_k_ip", "to_v_ip", "to_q_ip", "to_out_ip"):
            self.add_module(name, parts.get(name))

    def forward(self, attn: nn.Module, x: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Attn(Q, K', V') before to_out. ``x`` (B, L, N) is the attention's input, ``q`` its own projection of it,
        ``attn`` the attention of diffusers, ``tokens`` (B, T, C).
        """
        k, v = self.to_k_ip(tokens), self.to_v_ip(tokens)
        k = k + attn.to_k(tokens) if self.to_k_ip.adds_to_base else k
        v = v + attn.to_v(tokens) if self.to_v_ip.adds_to_base else v
        q = q if self.to_q_ip is None else q + self.to_q_ip(x)
        return attend(q, k, v, attn.heads)


class Processor:
    """Runs a cross-attention of diffusers with an image's tokens beside the text: for training, and for pipelines.

    Tokens come as ``cross_attention_kwargs={"ip_hidden_states": tokens}``; without them nothing is added. The adapter's
    parameters stay the adapter's: this is no module, so they are none of the UNet's.
    """

    def __init__(self, layer: ImageAttention):
        self.layer = layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None,
                 ip_hidden_states=None, ip_weight=1.0):  # fmt: skip
        x, text = hidden_states, hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = attn.to_q(x)
        out = attend(q, attn.to_k(text), attn.to_v(text), attn.heads)
        added = None
        if ip_hidden_states is not None:
            image = ip_weight * self.layer(attn, x, q, ip_hidden_states)
            out = out + image
            added = None if self.layer.to_out_ip is None else self.layer.to_out_ip(image)
        for step in attn.to_out:
            out = step(out)
        return out if added is None else out + added
