"""SDXL UNets (SDXL, Turbo, Lightning, SSD-1B, Segmind Vega, KOALA): text width 2048."""

from . import _unet
from .spec import FamilySpec

FAMILY = FamilySpec(
    id="sdxl",
    title="SDXL UNet",
    marks=(
        (r"input_blocks\.0\.0\.weight", None),
        (r".*transformer_blocks\.0\.attn2\.to_k\.weight", (1, 2048)),
    ),
    rules=_unet.rules(_unet.KEEP, "text key and value: 77 tokens, no speed to win"),
    diffusers_class="UNet2DConditionModel",
    diffusers_config=(("cross_attention_dim", 2048),),
    key_rules=_unet.key_rules,
    side_dtype="float16",
)
