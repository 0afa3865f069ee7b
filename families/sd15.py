"""SD1.x and SD2.x UNets, and small ones built like them (the demo model)."""

from . import _unet
from .spec import AWQ, TAGS, FamilySpec, Variant

FAMILY = FamilySpec(
    id="sd15",
    title="SD1.5-class UNet",
    marks=((r"input_blocks\.0\.0\.weight", None), (r".*transformer_blocks\.0\.attn2\.to_k\.weight", None)),
    # Half of a small model's attention weights read the text: worth 4 bits, but few tokens, so weight-only.
    rules=_unet.rules(AWQ, "text key and value: few tokens"),
    key_rules=_unet.key_rules,
    side_dtype="float16",
    lora_marks=(_unet.lora_mark(768, "SD1.5-class UNet"), _unet.lora_mark(1024, "SD2-class UNet")),
    module="UNetModel",
    inputs=_unet.inputs,
    variants=(
        Variant(
            id="demo",
            title="the demo model",
            classes={
                "SD15": {"context_dim": 128, "model_channels": 64},
                "UNet2DConditionModel": {"cross_attention_dim": 128, "block_out_channels": (64, 128, 192)},
            },
            style=TAGS,
            side=128,
            presets_of="sd15",
            ordinary=("ddim", "ddim_uniform", 25, 3.0),
        ),
        Variant(
            id="sd15",
            title="SD 1.5",
            classes={"SD15": {}, "UNet2DConditionModel": {}},
            style=TAGS,
            side=512,
            ordinary=("dpmpp_2m", "karras", 25, 7.0),
        ),
        Variant(
            id="sd2",
            title="SD 2.x",
            classes={"SD20": {}, "UNet2DConditionModel": {"cross_attention_dim": 1024}},
            style=TAGS,
            side=512,
            sized_like="sd15",
            ordinary=("dpmpp_2m", "karras", 25, 7.0),
        ),
    ),
    presets=_unet.presets("sd15", "sd2"),
)
