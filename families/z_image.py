"""Z-Image and Z-Image-Turbo: ComfyUI's Lumina 2 class of width 3840."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .preset import TEMPLATES, Preset
from .spec import KEEP, SVDQUANT, FamilySpec, Place, Published, Rule, Variant, in_blocks, renamed

RULES = (
    Rule(r"refiner", KEEP, "refines text or noise: few tokens, sensitive"),
    Rule(r"layers\.\d+\.attention\.(qkv|out)$", SVDQUANT, "attention"),
    Rule(r"layers\.\d+\.feed_forward\.w[123]$", SVDQUANT, "feed-forward (SwiGLU: never unsigned)"),
    Rule(r"", KEEP, "embedder, modulation, norm or output layer"),
)
TOP = {
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    "x_embedder": "all_x_embedder.2-1",
}
# The fused gate holds w3 before w1: first half times silu of the second.
BLOCK = (
    Place(("attention.to_qkv",), ("attention.qkv",)),
    Place(("attention.to_q", "attention.to_k", "attention.to_v"), ("attention.qkv",)),
    Place(("attention.to_out.0",), ("attention.out",)),
    Place(("attention.norm_q",), ("attention.q_norm",)),
    Place(("attention.norm_k",), ("attention.k_norm",)),
    Place(("feed_forward.net.0.proj",), ("feed_forward.w3", "feed_forward.w1")),
    Place(("feed_forward.net.2",), ("feed_forward.w2",)),
)


def _diffusers(names: Iterable[str], config: Mapping) -> list[Place]:
    names = list(names)
    out = renamed(TOP)
    for stem in ("layers.{}.", "noise_refiner.{}.", "context_refiner.{}."):
        out += in_blocks(names, stem, stem, BLOCK)
    return out


TURBO = Preset(
    id="z_image_turbo", title="Z-Image-Turbo", family="z_image", prediction="flow", schedule="simple", steps=8,
    made_for=(8,), sampler="res_multistep", shift=3.0, names=r"z[-_ ]?image.*turbo",
    shown=(1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3), source=f"{TEMPLATES}image_z_image_turbo.json",
)  # fmt: skip

FAMILY = FamilySpec(
    id="z_image",
    title="Z-Image",
    marks=(
        (r"layers\.0\.attention\.qkv\.weight", (1, 3840)),
        (r"cap_embedder\.1\.weight", None),
        (r"noise_refiner\.0\.attention\.k_norm\.weight", None),
    ),
    rules=RULES,
    published=(
        Published("nunchaku", (r"layers\.0\.attention\.to_qkv\.qweight", r"cap_embedder\.1\.weight"), _diffusers),
        Published("diffusers", (r"layers\.0\.attention\.to_q\..*", r"all_x_embedder\.2-1\.weight"), _diffusers),
    ),
    lora_marks=((r"layers_\d+_(attention|feed_forward)", None, "Lumina or Z-Image"),),
    variants=(
        Variant(
            id="z_image",
            title="Z-Image",
            classes={"ZImage": {}, "ZImageTransformer2DModel": {}},
            side=1024,
            sized_like="sdxl",
        ),
    ),
    presets=(TURBO,),
)
