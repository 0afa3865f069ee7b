"""SANA, as far as nunchaku's engine names it: read, inspected and converted; ComfyUI has no class that runs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .spec import KEEP, SVDQUANT, FamilySpec, Place, Published, Rule, in_blocks

RULES = (
    Rule(r"transformer_blocks\.\d+\.attn\d?\.(to_[qkv]|to_out\.0|qkv_proj|out_proj|pag_to_v)$", SVDQUANT, "attention"),
    Rule(r"transformer_blocks\.\d+\.cross_attn\.(q_linear|out_proj)$", SVDQUANT, "attention to the text"),
    Rule(r"ff\.(inverted_conv|point_conv)$", SVDQUANT, "feed-forward, 1 x 1 convolutions"),
    Rule(r"", KEEP, "embedder, text projection, depthwise convolution or output layer"),
)


def _engine(names: Iterable[str], config: Mapping) -> list[Place]:
    """The engine's own names stay; square layers lose the padding of the hidden width to a multiple of 128."""
    width = int(config.get("num_attention_heads", 0)) * int(config.get("attention_head_dim", 0))
    shape = (width, width) if width else None
    square = ("attn.out_proj", "attn.pag_to_v", "cross_attn.q_linear", "cross_attn.out_proj")
    block = [Place((s,), (s,), shape=shape) for s in square]
    return in_blocks(names, "transformer_blocks.{}.", "transformer_blocks.{}.", block)


FAMILY = FamilySpec(
    id="sana",
    title="SANA",
    marks=((r"transformer_blocks\.0\.cross_attn\.q_linear\.weight", None),),
    rules=RULES,
    published=(Published("nunchaku", (r"transformer_blocks\.0\.cross_attn\.q_linear\.qweight",), _engine),),
    unsupported="ComfyUI has no SANA model class; use the nunchaku engine with diffusers",
)
