"""Qwen-Image, Qwen-Image-Edit and their lightning variants. Native names are diffusers' own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .spec import AWQ, KEEP, SVDQUANT, FamilySpec, Place, Published, Rule, in_blocks

RULES = (
    Rule(r"(img_mod|txt_mod)\.1$", AWQ, "modulation: one row per image"),
    # GELU in its tanh form, in ComfyUI's class as in diffusers'
    Rule(r"(img_mlp|txt_mlp)\.net\.2$", SVDQUANT, "reads a GELU", act_unsigned=True, after=r"\1.net.0.proj"),
    Rule(r"transformer_blocks\.\d+\.(attn\.|img_mlp|txt_mlp)", SVDQUANT, "attention and feed-forward"),
    Rule(r"", KEEP, "embedder, norm or output layer"),
)


def _half(name: str) -> list[Place]:
    fc2 = f"{name}_mlp.net.2"
    return [
        Place((f"{name}_mod.1",), (f"{name}_mod.1",), interleaved=6, plus_one=(1, 4)),
        Place((fc2,), (fc2,), unsigned=(fc2,)),
    ]


def _nunchaku(names: Iterable[str], config: Mapping) -> list[Place]:
    block = [
        Place(("attn.to_qkv",), ("attn.to_q", "attn.to_k", "attn.to_v")),
        Place(("attn.add_qkv_proj",), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        *_half("img"),
        *_half("txt"),
    ]
    return in_blocks(names, "transformer_blocks.{}.", "transformer_blocks.{}.", block)


FAMILY = FamilySpec(
    id="qwen_image",
    title="Qwen-Image",
    marks=(
        (r"transformer_blocks\.0\.img_mod\.1\.weight", None),
        (r"transformer_blocks\.0\.attn\.add_q_proj\.weight", None),
    ),
    rules=RULES,
    published=(
        Published(
            "nunchaku",
            (r"transformer_blocks\.0\.img_mod\.1\..*", r"transformer_blocks\.0\.attn\.to_qkv\.qweight"),
            _nunchaku,
        ),
    ),
)
