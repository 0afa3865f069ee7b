"""FLUX.2 (dev, klein). FLUX.1's names, and three things of its own: every feed-forward is gated by SiLU (SwiGLU), so no
layer reads a GELU; no layer has a bias; and one modulation serves all blocks of a kind.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from . import flux
from .preset import TEMPLATES, Preset
from .spec import KEEP, SVDQUANT, FamilySpec, Published, Rule, Variant, renamed

RULES = (
    # 2 to 4 % of the weights, read once a step for one row. In 4 bits they add half as much error to the picture as all
    # other weights in 4 bits do (random weights, 4 + 16 blocks: 0.0077 to 0.0171), since they add it in every block.
    Rule(r"stream_modulation(_img|_txt)?\.lin(ear)?$", KEEP, "modulation of all blocks: its error would be in each"),
    Rule(r"(img_attn|txt_attn)\.(qkv|proj)$", SVDQUANT, "attention"),
    Rule(r"(img_mlp|txt_mlp)\.[02]$", SVDQUANT, "feed-forward (SwiGLU: never unsigned)"),
    Rule(r"single_blocks\.\d+\.linear[12]$", SVDQUANT, "fused attention and feed-forward (SwiGLU)"),
    Rule(r"transformer_blocks\.\d+\.attn\.", SVDQUANT, "attention, in single blocks with feed-forward"),
    Rule(r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)$", SVDQUANT, "feed-forward (SwiGLU)"),
    Rule(r"", KEEP, "embedder, norm or output layer"),
)
TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
DOUBLE = {
    **flux.ATTENTION,
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
SINGLE = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}

KLEIN = Preset(
    id="flux2_klein", title="FLUX.2-klein 4B and 9B", family="flux2", prediction="flow", schedule="flux2", steps=4,
    made_for=(4,), sampler="euler", shown=(1.0, 0.9674, 0.9081, 0.7672), names=r"klein",
    source=f"{TEMPLATES}image_flux2_klein_text_to_image.json",
)  # fmt: skip
KLEIN_BASE = replace(
    KLEIN, id="flux2_klein_base", title="FLUX.2-klein base (not distilled)", steps=20, made_for=tuple(range(20, 51)),
    cfg=5.0, names=r"klein.*base|base.*klein",
    shown=(1.0, 0.9942, 0.9878, 0.9808, 0.973, 0.9643, 0.9546, 0.9436, 0.9311, 0.9167, 0.9001, 0.8805, 0.8572, 0.8291,
           0.7942, 0.7501, 0.6925, 0.6138, 0.5002, 0.3216),
)  # fmt: skip
DEV_TURBO = replace(
    KLEIN, id="flux2_dev_turbo", title="FLUX.2-dev with Turbo LoRA", steps=8, made_for=(8,), guidance=4.0,
    names=r"flux[-_. ]?2.*turbo", lora="Flux_2-Turbo-LoRA_comfyui",
    source=f"{TEMPLATES}image_flux2_text_to_image.json",
    shown=(1.0, 0.9854, 0.9666, 0.9415, 0.9062, 0.8528, 0.763, 0.5798),
)  # fmt: skip

FAMILY = FamilySpec(
    id="flux2",
    title="FLUX.2",
    marks=(
        (r"double_stream_modulation_img\.lin\.weight", None),
        (r"double_blocks\.0\.img_attn\.qkv\.weight", None),
        (r"single_blocks\.0\.linear1\.weight", None),
    ),
    rules=RULES,
    key_rules=partial(flux.key_rules, top=TOP, double=DOUBLE, single=SINGLE, counts=(8, 48)),
    published=(
        Published(
            "diffusers",
            (
                r"transformer_blocks\.0\.attn\.add_q_proj\..*",
                r"single_transformer_blocks\.0\.attn\.to_qkv_mlp_proj\..*",
            ),
            partial(flux.places, top=TOP, double=renamed(DOUBLE), single=renamed(SINGLE)),
            others="none",
        ),
    ),
    module="Flux",
    inputs=flux.inputs,
    variants=(
        Variant(
            id="flux2",
            title="FLUX.2",
            classes={"Flux2": {}, "Flux2Transformer2DModel": {}},
            side=1024,
            sized_like="sdxl",
        ),
    ),
    presets=(KLEIN_BASE, KLEIN, DEV_TURBO),
)
