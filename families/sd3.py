"""Stable Diffusion 3 and 3.5 (MMDiT). Joint blocks of an image and a text half; modulations are AWQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .preset import HYPER, Preset
from .spec import AWQ, KEEP, SVDQUANT, FamilySpec, KeyRule, Rule, Variant, block_pairs, layer_rules

GELU = "reads a GELU"  # its tanh form, in ComfyUI's class as in diffusers'
RULES = (
    Rule(r"joint_blocks\.\d+\.\w+\.adaLN_modulation\.1$", AWQ, "modulation: one row per image"),
    Rule(r"transformer_blocks\.\d+\.norm1(_context)?\.linear$", AWQ, "modulation: one row per image"),
    Rule(r"(joint_blocks\.\d+\.\w+\.mlp)\.fc2$", SVDQUANT, GELU, act_unsigned=True, after=r"\1.fc1"),
    Rule(r"\.ff(_context)?\.net\.2$", SVDQUANT, GELU, act_unsigned=True, after=r".ff\1.net.0.proj"),
    Rule(r"joint_blocks\.\d+\.\w+\.(attn2?\.(qkv|proj)|mlp\.fc1)$", SVDQUANT, "attention and feed-forward"),
    Rule(r"transformer_blocks\.\d+\.(attn2?|ff|ff_context)\.", SVDQUANT, "attention and feed-forward"),
    Rule(r"", KEEP, "embedder, norm or output layer"),
)
TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
IMAGE = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.proj": "attn.to_out.0",
    "attn.ln_q": "attn.norm_q",
    "attn.ln_k": "attn.norm_k",
    "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "attn2.proj": "attn2.to_out.0",
    "attn2.ln_q": "attn2.norm_q",
    "attn2.ln_k": "attn2.norm_k",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
TEXT = {
    "adaLN_modulation.1": "norm1_context.linear",
    "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.proj": "attn.to_add_out",
    "attn.ln_q": "attn.norm_added_q",
    "attn.ln_k": "attn.norm_added_k",
    "mlp.fc1": "ff_context.net.0.proj",
    "mlp.fc2": "ff_context.net.2",
}


def key_rules(config: Mapping) -> list[KeyRule]:
    """Native <- diffusers for an SD3Transformer2DModel ``config``."""
    layers = config.get("num_layers", 18)
    halves = {f"x_block.{a}": b for a, b in IMAGE.items()} | {f"context_block.{a}": b for a, b in TEXT.items()}
    pairs = block_pairs(layers, "joint_blocks.{}.", "transformer_blocks.{}.", halves)
    # The last block's text half ends in a plain (scale, shift) norm, as the final layer does.
    last = f"joint_blocks.{layers - 1}.context_block.adaLN_modulation.1"
    out = layer_rules([*TOP.items(), *pairs], swap=frozenset({"final_layer.adaLN_modulation.1", last}))
    return [*out, KeyRule("pos_embed", ("pos_embed.pos_embed",))]


def inputs(config: Mapping) -> dict[str, tuple[int, ...]]:
    width = config["context_embedder_config"]["params"]["in_features"]
    return {"context": (154, width), "y": (config["adm_in_channels"],)}  # CLIP's 77 tokens, and T5's


TURBO = Preset(
    id="sd35_large_turbo", title="SD 3.5 Large Turbo", family="sd3", prediction="flow", schedule="normal", steps=4,
    made_for=(4,), sampler="euler", shift=3.0, shown=(1.0, 0.8577, 0.6022, 0.0089),
    names=r"(?:sd|diffusion)[-_ ]?3[._-]?5.*turbo", source="https://github.com/Stability-AI/sd3.5/blob/main/sd3_infer.py",
)  # fmt: skip

HYPER_CFG = replace(
    TURBO, id="hyper_sd3_cfg", title="Hyper-SD for SD 3, CFG-preserved", steps=8, made_for=(4, 8, 16), cfg=5.0,
    cfg_at=((1, 3.0), (8, 5.0), (16, 7.0)), lora="Hyper-SD3-8steps-CFG-lora", lora_strength=0.125,
    names=r"hyper[-_ ]?sd[-_ ]?3.*?(?P<steps>\d+)[-_ ]?step", source=HYPER,
    shown=(1.0, 0.9475, 0.8828, 0.8008, 0.6938, 0.548, 0.338, 0.0089),
)  # fmt: skip

FAMILY = FamilySpec(
    id="sd3",
    title="Stable Diffusion 3",
    marks=((r"joint_blocks\.0\.context_block\.attn\.qkv\.weight", None), (r"x_embedder\.proj\.weight", None)),
    rules=RULES,
    key_rules=key_rules,
    lora_marks=((r"joint_blocks_", None, "Stable Diffusion 3"),),
    module="OpenAISignatureMMDITWrapper",
    inputs=inputs,
    variants=(
        Variant(
            id="sd3",
            title="SD 3 / 3.5",
            classes={"SD3": {}, "SD3Transformer2DModel": {}},
            side=1024,
            sized_like="sdxl",
            ordinary=("dpmpp_2m", "sgm_uniform", 28, 4.5),
        ),
    ),
    presets=(TURBO, HYPER_CFG),
)
