"""A model nobody has described yet: decided by what a layer's name says it does, and by its shape.

Models whose layers have no file of their own, but which have presets, are variants of it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .flux import SHIFTED_4, SHIFTED_8
from .preset import TEMPLATES
from .spec import AWQ, KEEP, SVDQUANT, FamilySpec, Rule, Variant
from .z_image import TURBO

EMBED, ENDS = "embedder", "input or output layer"
MODULATION, NAMED = "modulation: few rows", "attention or feed-forward, by name"

KREA2 = replace(
    TURBO, id="krea2_turbo", title="Krea 2 Turbo", family="krea2", sampler="euler", shift=None, shown=SHIFTED_8,
    names=r"krea[-_ ]?2.*turbo", source=f"{TEMPLATES}image_krea2_turbo_t2i.json",
)  # fmt: skip
PRESETS = (
    KREA2,
    replace(KREA2, id="lens_turbo", title="Lens Turbo", family="lens", size_shift=True, steps=4, made_for=(4,),
            shown=SHIFTED_4, names=r"lens.*turbo", source=f"{TEMPLATES}image_lens_turbo_t2i.json"),
    replace(KREA2, id="ernie_turbo", title="ERNIE-Image Turbo", family="ernie", shown=TURBO.shown,
            names=r"ernie.*turbo", source=f"{TEMPLATES}image_ernie_image_turbo.json"),
    replace(KREA2, id="mage_flow_turbo", title="Mage-Flow Turbo", family="mage_flow", steps=4, made_for=(4,),
            shown=(1.0, 0.9474, 0.8571, 0.6667), names=r"mage[-_ ]?flow.*turbo",
            source=f"{TEMPLATES}image_mage_flow_turbo_t2i_int8.json"),
    replace(KREA2, id="boogu_turbo", title="Boogu-Image Turbo", family="boogu", schedule="sgm_uniform",
            sampler="lcm", steps=4, made_for=(4,), shown=(1.0, 0.9049, 0.7608, 0.5161),
            names=r"boogu.*turbo", source=f"{TEMPLATES}image_boogu_image_0_1_turbo_t2i.json"),
)  # fmt: skip

FAMILY = FamilySpec(
    id="generic",
    title="unknown architecture",
    marks=((r".*\.weight", None),),
    rules=(
        Rule(r"(?i)embed|(^|[._])(time|timestep|guidance|vector|label|txt|img|text|context|cap)_in\b", KEEP, EMBED),
        Rule(r"(?i)(^|\.)(x_in|proj_in|proj_out|conv_in|conv_out|head|final\w*|out_layer|norm_out)(\.|$)", KEEP, ENDS),
        Rule(r"(?i)(refiner|connector|adapter)", KEEP, "refines text or adapts: few tokens, sensitive"),
        Rule(r"transformer_blocks\.0\.attn2\.to_k$", SVDQUANT, NAMED, keeps_columns=True),  # LTX
        Rule(r"(^|\.)blocks\.0\.norm1\.linear$", AWQ, MODULATION, keeps_columns=True),  # CogVideoX
        Rule(r"(?i)(\bmod\b|modulation|adaln|_mod\.|norm\d?(_context)?\.linear)", AWQ, MODULATION),
        Rule(
            r"(?i)(attn|attention|qkv|(to|wq|wk|wv|q|k|v|o)_?(proj|out|linear)|mlp|ff|feed_?forward|ffn|fc\d|linear\d)",
            SVDQUANT,
            NAMED,
        ),
        Rule(r"", KEEP, "its name does not say what it does"),
    ),
    variants=(
        Variant(id="krea2", title="Krea 2", classes={"Krea2": {}, "Krea2Transformer2DModel": {}}, shift=math.exp(1.15)),
        Variant(id="lens", title="Lens", classes={"Lens": {}}),
        Variant(
            id="ernie", title="ERNIE-Image", classes={"ErnieImage": {}, "ErnieImageTransformer2DModel": {}}, shift=3.0
        ),
        Variant(id="mage_flow", title="Mage-Flow", classes={"MageFlow": {}}, shift=6.0),
        Variant(id="boogu", title="Boogu-Image", classes={"Boogu": {}}, shift=3.16),
    ),
    presets=PRESETS,
)
