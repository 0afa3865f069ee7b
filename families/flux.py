"""FLUX.1 (dev, schnell, fill, kontext, krea ...). Double blocks, then single blocks; modulations are AWQ.

Chroma, LongCat-Image and Hunyuan's models are built of the same blocks, GELU and all. Ovis-Image's have a SwiGLU of
three layers instead; FLUX.2, whose SwiGLU has FLUX.1's names, is a family of its own (flux2.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from .preset import HF, HYPER, Preset
from .spec import (
    AWQ,
    COLUMNS,
    KEEP,
    MAX_TOKENS,
    PROSE,
    SVDQUANT,
    FamilySpec,
    KeyRule,
    Place,
    Published,
    Rule,
    Variant,
    block_pairs,
    in_blocks,
    layer_rules,
    renamed,
)

GELU = "reads a GELU"  # its tanh form, in ComfyUI's class as in diffusers': never below -0.1701
RULES = (
    Rule(r"(img_mod|txt_mod)\.lin$|\.modulation\.lin$", AWQ, "modulation: one row per image"),
    Rule(r"transformer_blocks\.\d+\.norm\d?(_context)?\.linear$", AWQ, "modulation: one row per image"),
    Rule(r"(img_mlp|txt_mlp)\.2$", SVDQUANT, GELU, act_unsigned=True, after=r"\1.0"),
    Rule(r"\.ff(_context)?\.net\.2$", SVDQUANT, GELU, act_unsigned=True, after=r".ff\1.net.0.proj"),
    Rule(r"(img_mlp|txt_mlp)\.(gate|up|down)_proj$", SVDQUANT, "feed-forward (SwiGLU: never unsigned)"),
    Rule(r"(img_attn|txt_attn)\.(qkv|proj)$|(img_mlp|txt_mlp)\.0$", SVDQUANT, "attention and feed-forward"),
    Rule(r"single_blocks\.\d+\.linear[12]$", SVDQUANT, "fused attention and feed-forward"),
    Rule(r"transformer_blocks\.\d+\.(attn\.|ff|proj_mlp$|proj_out$)", SVDQUANT, "attention and feed-forward"),
    Rule(r"", KEEP, "embedder, norm or output layer"),
)
TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
ATTENTION = {  # of the blocks with two streams, FLUX.2's too
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}
DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    **ATTENTION,
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}


SWAPPED = "final_layer.adaLN_modulation.1"  # (scale, shift) there, (shift, scale) here
DOUBLES = ("double_blocks.{}.", "transformer_blocks.{}.")
SINGLES = ("single_blocks.{}.", "single_transformer_blocks.{}.")


def key_rules(config: Mapping, top=TOP, double=DOUBLE, single=SINGLE, counts=(19, 38)) -> list[KeyRule]:
    """Native <- diffusers for a FluxTransformer2DModel ``config``, or by FLUX.2's tables and its usual ``counts``."""
    doubles = block_pairs(config.get("num_layers", counts[0]), *DOUBLES, double)
    singles = block_pairs(config.get("num_single_layers", counts[1]), *SINGLES, single)
    return layer_rules([*top.items(), *doubles, *singles], swap=frozenset({SWAPPED}))


def places(names: Iterable[str], config: Mapping, top, double: list[Place], single: list[Place]) -> list[Place]:
    """Those of ``top``, and in each block in ``names`` those of its kind."""
    names = list(names)
    doubles, singles = in_blocks(names, *DOUBLES[::-1], double), in_blocks(names, *SINGLES[::-1], single)
    return [*renamed(top, swap=(SWAPPED,)), *doubles, *singles]


def _double(image: bool) -> list[Place]:
    """nunchaku's names of one half of a double block, v1 and v2 (the python engine's)."""
    native, context = ("img", "") if image else ("txt", "_context")
    qkv, out, norm = (("attn.to_qkv", "attn.to_out.0", "norm_") if image else
                      ("attn.add_qkv_proj", "attn.to_add_out", "norm_added_"))  # fmt: skip
    fc2 = (f"mlp{context}_fc2", f"ff{context}.net.2")
    return [
        *(Place((s,), (f"{native}_attn.qkv",)) for s in (f"qkv_proj{context}", qkv)),
        *(Place((s,), (f"{native}_attn.proj",)) for s in (f"out_proj{context}", out)),
        *(Place((s,), (f"{native}_mlp.0",)) for s in (f"mlp{context}_fc1", f"ff{context}.net.0.proj")),
        *(Place((s,), (f"{native}_mlp.2",), unsigned=(s,)) for s in fc2),
        Place((f"norm1{context}.linear",), (f"{native}_mod.lin",), interleaved=6, plus_one=(1, 4)),
        *(Place((f"{p}{norm}q",), (f"{native}_attn.norm.query_norm",)) for p in ("", "attn.")),
        *(Place((f"{p}{norm}k",), (f"{native}_attn.norm.key_norm",)) for p in ("", "attn.")),
    ]


def _single() -> list[Place]:
    """nunchaku's names of a single block. linear2 stays two layers: only its second half reads a GELU."""
    out = []
    for qkv, attn in (("qkv_proj", "out_proj"), ("attn.to_qkv", "attn.to_out"), ("attn.to_qkv", "attn.to_out.0")):
        out += [
            Place((qkv, "mlp_fc1"), ("linear1",)),
            Place((attn, "mlp_fc2"), ("linear2",), axis=COLUMNS, unsigned=("mlp_fc2",)),
        ]
    out += [
        Place((f"{p}norm_{a}",), (f"norm.{n}_norm",)) for p in ("", "attn.") for a, n in (("q", "query"), ("k", "key"))
    ]
    return [*out, Place(("norm.linear",), ("modulation.lin",), interleaved=3, plus_one=(1,))]


def inputs(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Of FLUX.2, too, which has ComfyUI's class but no pooled vector."""
    pooled = {"y": (config["vec_in_dim"],)} if config.get("vec_in_dim") else {}
    guidance = {"guidance": ()} if config.get("guidance_embed") else {}
    return {"context": (MAX_TOKENS[PROSE], config["context_in_dim"]), **pooled, **guidance}


# ``shown`` are sigmas at 1024 x 1024: e^1.15 / (e^1.15 + 1/u - 1) where the shift is by size
SHIFTED_4 = (1.0, 0.9045, 0.7595, 0.5128)
SHIFTED_8 = (1.0, 0.9567, 0.9045, 0.8403, 0.7595, 0.6546, 0.5128, 0.3109)
DEV = Preset(
    id="flux_dev", title="FLUX.1-dev (not distilled to few steps)", family="flux", prediction="flow",
    schedule="simple", steps=20, made_for=tuple(range(20, 51)), sampler="euler", size_shift=True, guidance=3.5,
    names=r"flux[-_.]?1[-_.]?dev|flux[-_]?dev", of_class=True, source=f"{HF}black-forest-labs/FLUX.1-dev",
    shown=(1.0, 0.9836, 0.966, 0.9471, 0.9266, 0.9045, 0.8805, 0.8543, 0.8257, 0.7942, 0.7595, 0.721, 0.678, 0.6297,
           0.5751, 0.5128, 0.4412, 0.3579, 0.2598, 0.1425),
)  # fmt: skip
SCHNELL = Preset(
    id="flux_schnell", title="FLUX.1-schnell", family="flux_schnell", prediction="flow", schedule="simple", steps=4,
    made_for=(1, 2, 3, 4), sampler="euler", shown=(1.0, 0.75, 0.5, 0.25), names=r"schnell", of_class=True,
    source=f"{HF}black-forest-labs/FLUX.1-schnell",
)  # fmt: skip
HYPER_DEV = replace(
    DEV, id="hyper_flux", title="Hyper-SD for FLUX.1-dev", steps=8, made_for=(8, 16), shown=SHIFTED_8, of_class=False,
    names=r"hyper[-_ ]?flux.*?(?P<steps>\d+)[-_ ]?step", lora="Hyper-FLUX.1-dev-8steps-lora", lora_strength=0.125,
    source=HYPER,
)  # fmt: skip
TURBO_ALPHA = replace(
    HYPER_DEV, id="flux_turbo_alpha", title="FLUX.1-Turbo-Alpha", made_for=(8,), lora="FLUX.1-Turbo-Alpha",
    names=r"turbo[-_ ]?alpha", lora_strength=1.0, source=f"{HF}alimama-creative/FLUX.1-Turbo-Alpha",
)  # fmt: skip

FAMILY = FamilySpec(
    id="flux",
    title="FLUX.1",
    marks=((r"double_blocks\.0\.img_attn\.qkv\.weight", None), (r"single_blocks\.0\.linear1\.weight", None)),
    rules=RULES,
    key_rules=key_rules,
    published=(
        Published(
            "nunchaku",
            (r"transformer_blocks\.0\.(qkv_proj|attn\.to_qkv)\.qweight", r"single_transformer_blocks\.0\..*"),
            partial(places, top=TOP, double=[*_double(True), *_double(False)], single=_single()),
            others="none",
        ),
        Published(
            "diffusers",
            (r"transformer_blocks\.0\.attn\.add_q_proj\..*", r"single_transformer_blocks\.0\.attn\.to_q\..*"),
            partial(places, top=TOP, double=renamed(DOUBLE), single=renamed(SINGLE)),
            others="none",
        ),
    ),
    lora_marks=((r"double_blocks_|single_transformer_blocks_|single_blocks_", None, "FLUX.1"),),
    module="Flux",
    inputs=inputs,
    variants=(
        Variant(
            id="flux",
            title="FLUX.1-dev",
            classes={"Flux": {}, "FluxTransformer2DModel": {"guidance_embeds": True}},
            side=1024,
            sized_like="sdxl",
            ordinary_preset=DEV.id,
        ),
        Variant(
            id="flux_schnell",
            title="FLUX.1-schnell",
            classes={"FluxSchnell": {}, "FluxTransformer2DModel": {}},
            side=1024,
            sized_like="flux",
            loras_of="flux",
            shift=1.0,
        ),
    ),
    presets=(SCHNELL, HYPER_DEV, TURBO_ALPHA, DEV),
)
