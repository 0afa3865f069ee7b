"""Qwen-Image, Qwen-Image-Edit and their lightning variants. Native names are diffusers' own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from .preset import TEMPLATES, Preset
from .spec import AWQ, KEEP, SVDQUANT, FamilySpec, Place, Published, Rule, Variant, in_blocks

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


LIGHTNING = Preset(
    id="qwen_lightning", title="Qwen-Image-Lightning", family="qwen_image", prediction="flow", schedule="simple",
    steps=4, made_for=(4, 8), sampler="euler", shift=3.0, shown=(1.0, 0.9, 0.75, 0.5),
    names=r"qwen.*lightning(?:.*?(?P<steps>\d+)[-_ ]?step)?", lora="Qwen-Image-Lightning-4steps-V1.0",
    source="https://github.com/ModelTC/Qwen-Image-Lightning",
)  # fmt: skip
WULI = replace(
    LIGHTNING, id="qwen_2512_turbo", title="Qwen-Image-2512 Turbo (Wuli)", steps=2, made_for=(2,), shown=(1.0, 0.75),
    names=r"wuli|2512[-_ ]?turbo", lora="Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0",
    source=f"{TEMPLATES}image_qwen_image_2512_with_2steps_lora.json",
)  # fmt: skip

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
    lora_marks=((r"transformer_blocks_\d+_(img|txt)_m(od|lp)", None, "Qwen-Image"),),
    variants=(
        Variant(
            id="qwen_image",
            title="Qwen-Image",
            classes={"QwenImage": {}, "QwenImageTransformer2DModel": {}},
            side=1328,
            sized_like="sdxl",
            ordinary=("euler", "simple", 20, 2.5),
        ),
    ),
    presets=(WULI, LIGHTNING),
)
