"""SDXL UNets (SDXL, Turbo, Lightning, SSD-1B, Segmind Vega, KOALA): text width 2048."""

from collections.abc import Iterable, Mapping

from . import _unet
from .spec import KEEP, TAGS, FamilySpec, Place, Published, Variant

BASE = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
}


def _nunchaku(names: Iterable[str], config: Mapping) -> list[Place]:
    """SDXL's own layout where the file says nothing else."""
    return _unet.places(names, {**BASE, **config})


FAMILY = FamilySpec(
    id="sdxl",
    title="SDXL UNet",
    marks=(
        (r"input_blocks\.0\.0\.weight", None),
        (r".*transformer_blocks\.0\.attn2\.to_k\.weight", (1, 2048)),
    ),
    rules=_unet.rules(KEEP, "text key and value: 77 tokens, no speed to win"),
    diffusers_config=(("cross_attention_dim", 2048),),
    key_rules=_unet.key_rules,
    side_dtype="float16",
    published=(
        Published(
            "nunchaku",
            (r"down_blocks\.1\.attentions\.0\.transformer_blocks\.0\.attn1\.to_qkv\.qweight",),
            _nunchaku,
            others="none",
        ),
    ),
    lora_marks=(_unet.lora_mark(2048, "SDXL UNet"),),
    module="UNetModel",
    inputs=_unet.inputs,
    variants=(
        Variant(
            id="sdxl",
            title="SDXL",
            classes={"SDXL": {}, "UNet2DConditionModel": {"addition_embed_type": "text_time"}},
            style=TAGS,
            side=1024,
            ordinary=("dpmpp_2m", "karras", 25, 6.0),
        ),
    ),
    presets=_unet.presets("sdxl"),
)
