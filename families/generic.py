"""A model nobody has described yet: decided by what a layer's name says it does, and by its shape. Tried last."""

from .spec import AWQ, KEEP, SVDQUANT, FamilySpec, Rule

EMBED, ENDS = "embedder", "input or output layer"
MODULATION, NAMED = "modulation: few rows", "attention or feed-forward, by name"

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
)  # fmt: skip
