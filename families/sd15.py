"""SD1.x and SD2.x UNets, and small ones built like them (the demo model)."""

from . import _unet
from .spec import AWQ, FamilySpec

FAMILY = FamilySpec(
    id="sd15",
    title="SD1.5-class UNet",
    marks=((r"input_blocks\.0\.0\.weight", None), (r".*transformer_blocks\.0\.attn2\.to_k\.weight", None)),
    # Half of a small model's attention weights read the text: worth 4 bits, but few tokens, so weight-only.
    rules=_unet.rules(AWQ, "text key and value: few tokens"),
    diffusers_class="UNet2DConditionModel",
    key_rules=_unet.key_rules,
    side_dtype="float16",
)
