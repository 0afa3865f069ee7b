"""PixArt-alpha and PixArt-Sigma in their authors' names. No packed 4-bit file of it is known; ours are made from 16
bits.
"""

from .spec import KEEP, SVDQUANT, FamilySpec, Rule

FAMILY = FamilySpec(
    id="pixart",
    title="PixArt",
    marks=(
        (r"blocks\.0\.cross_attn\.kv_linear\.weight", None),
        (r"blocks\.0\.scale_shift_table", None),
        (r"t_block\.1\.weight", None),
    ),
    rules=(
        Rule(r"blocks\.\d+\.cross_attn\.kv_linear$", KEEP, "text key and value: few tokens, no speed to win"),
        # GELU in its tanh form, in ComfyUI's class as in the authors'
        Rule(r"(blocks\.\d+\.mlp)\.fc2$", SVDQUANT, "reads a GELU", act_unsigned=True, after=r"\1.fc1"),
        Rule(
            r"blocks\.\d+\.(attn\.(qkv|proj)|cross_attn\.(q_linear|proj)|mlp\.fc1)$",
            SVDQUANT,
            "attention and feed-forward",
        ),
        Rule(r"", KEEP, "embedder, norm or output layer"),
    ),
)
