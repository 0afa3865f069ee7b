"""A key of a LoRA file = what it changes + which part of the change it is: every trainer's suffixes in one table.

kohya       lora_unet_<path with _>.lora_down.weight    .alpha   .dora_scale
diffusers   unet.<path>.lora_A.weight | transformer.<path>... | <path>.lora.down.weight | <path>_lora.down.weight
PEFT        base_model.model.<path>.lora_A.weight        .lora_magnitude_vector; alpha in adapter_config.json
ComfyUI     diffusion_model.<path>.lora_down.weight      .diff .diff_b .set_weight .reshape_weight
OneTrainer  lora_transformer_<path with _>.lora_down.weight | <part>.<path>.lora_down.weight
LyCORIS     <any of these>.hada_w1_a | .lokr_w1 | .oft_blocks ...
XLabs       double_blocks.0.processor.qkv_lora1.down.weight
"""

from __future__ import annotations

import re

# suffix -> role
ROLES = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    ".lora_A": "down", ".lora_B": "up",
    ".alpha": "alpha", ".dora_scale": "dora_scale", ".reshape_weight": "reshape",
    ".lora_magnitude_vector": "dora_scale", ".lora_magnitude_vector.weight": "dora_scale",
    ".hada_w1_a": "hada_w1_a", ".hada_w1_b": "hada_w1_b", ".hada_w2_a": "hada_w2_a", ".hada_w2_b": "hada_w2_b",
    ".hada_t1": "hada_t1", ".hada_t2": "hada_t2",
    ".lokr_w1": "lokr_w1", ".lokr_w1_a": "lokr_w1_a", ".lokr_w1_b": "lokr_w1_b",
    ".lokr_w2": "lokr_w2", ".lokr_w2_a": "lokr_w2_a", ".lokr_w2_b": "lokr_w2_b", ".lokr_t2": "lokr_t2",
    ".oft_blocks": "oft_blocks", ".rescale": "rescale",
    ".a1.weight": "a1", ".a2.weight": "a2", ".b1.weight": "b1", ".b2.weight": "b2",
    ".diff": "diff", ".diff_b": "diff_b", ".lora_B.bias": "diff_b", ".set_weight": "set_weight",
    ".w_norm": "w_norm", ".b_norm": "b_norm",
}  # fmt: skip
SUFFIXES = tuple(sorted(ROLES, key=len, reverse=True))
NAMED_ADAPTER = re.compile(
    r"(.+)\.lora_(A|B|magnitude_vector)\.\w+(?:\.weight)?$"
)  # PEFT with the adapter's name in it
NAMED_ROLES = {"A": "down", "B": "up", "magnitude_vector": "dora_scale"}
# role -> the suffix that ComfyUI's loaders know
COMFYUI = {
    "down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight", "reshape": ".reshape_weight",
    "a1": ".a1.weight", "a2": ".a2.weight", "b1": ".b1.weight", "b2": ".b2.weight",
}  # fmt: skip
# kind -> roles of which one set must be whole; the first kind that fits names a target
KINDS = (
    ("lora", ({"down", "up"},)),
    ("loha", ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},)),
    ("lokr", ({"lokr_w1", "lokr_w2"}, {"lokr_w1_a", "lokr_w1_b", "lokr_w2"}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
              {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"})),
    ("oft", ({"oft_blocks"},)),
    ("glora", ({"a1", "a2", "b1", "b2"},)),
    ("diff", ({"diff"}, {"w_norm"})),
    ("set", ({"set_weight"},)),
    ("bias", ({"diff_b"},)),
)  # fmt: skip
XLABS = (
    (re.compile(r"\.processor\.(qkv|proj)_lora1\."), r".img_attn.\1.lora."),
    (re.compile(r"\.processor\.(qkv|proj)_lora2\."), r".txt_attn.\1.lora."),
    (re.compile(r"\.processor\.qkv_lora\."), ".linear1_qkv.lora."),
    (re.compile(r"\.processor\.proj_lora\."), ".linear2.lora."),
)


def split(key: str) -> tuple[str, str] | None:
    """(target, role) of a key, or None for one that is no part of any kind of LoRA."""
    for pattern, new in XLABS:
        key = pattern.sub(new, key)
    for suffix in SUFFIXES:
        if key.endswith(suffix) and len(key) > len(suffix):
            return key.removesuffix(suffix), ROLES[suffix]
    named = NAMED_ADAPTER.match(key)
    return (named[1], NAMED_ROLES[named[2]]) if named else None


def kind_of(roles) -> str:
    """What a target with these roles is: one of `KINDS`, or "" when parts are missing."""
    have = set(roles)
    for kind, sets in KINDS:
        if any(need <= have for need in sets):
            return kind
    return ""


def comfyui_suffix(role: str) -> str:
    return COMFYUI.get(role, f".{role}")
