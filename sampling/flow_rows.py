"""Presets of flow-matching transformers. ``shown`` are sigmas at 1024 x 1024; templates are ComfyUI's own."""

from __future__ import annotations

from dataclasses import replace

from .preset import Preset

HF = "https://huggingface.co/"
HYPER = f"{HF}ByteDance/Hyper-SD"
TEMPLATES = "https://github.com/Comfy-Org/workflow_templates/blob/main/templates/"
# FLUX.1 at 1024 x 1024: e^1.15 / (e^1.15 + 1/u - 1)
FLUX_4 = (1.0, 0.9045, 0.7595, 0.5128)
FLUX_8 = (1.0, 0.9567, 0.9045, 0.8403, 0.7595, 0.6546, 0.5128, 0.3109)

FLUX = Preset(
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
HYPER_FLUX = replace(
    FLUX, id="hyper_flux", title="Hyper-SD for FLUX.1-dev", steps=8, made_for=(8, 16), shown=FLUX_8, of_class=False,
    names=r"hyper[-_ ]?flux.*?(?P<steps>\d+)[-_ ]?step", lora="Hyper-FLUX.1-dev-8steps-lora", lora_strength=0.125,
    source=HYPER,
)  # fmt: skip
SD3 = Preset(
    id="sd35_large_turbo", title="SD 3.5 Large Turbo", family="sd3", prediction="flow", schedule="normal", steps=4,
    made_for=(4,), sampler="euler", shift=3.0, shown=(1.0, 0.8577, 0.6022, 0.0089),
    names=r"(?:sd|diffusion)[-_ ]?3[._-]?5.*turbo", source="https://github.com/Stability-AI/sd3.5/blob/main/sd3_infer.py",
)  # fmt: skip
QWEN = Preset(
    id="qwen_lightning", title="Qwen-Image-Lightning", family="qwen_image", prediction="flow", schedule="simple",
    steps=4, made_for=(4, 8), sampler="euler", shift=3.0, shown=(1.0, 0.9, 0.75, 0.5),
    names=r"qwen.*lightning(?:.*?(?P<steps>\d+)[-_ ]?step)?", lora="Qwen-Image-Lightning-4steps-V1.0",
    source="https://github.com/ModelTC/Qwen-Image-Lightning",
)  # fmt: skip
KLEIN = Preset(
    id="flux2_klein", title="FLUX.2-klein 4B and 9B", family="flux2", prediction="flow", schedule="flux2", steps=4,
    made_for=(4,), sampler="euler", shown=(1.0, 0.9674, 0.9081, 0.7672), names=r"klein",
    source=f"{TEMPLATES}image_flux2_klein_text_to_image.json",
)  # fmt: skip
Z_IMAGE = Preset(
    id="z_image_turbo", title="Z-Image-Turbo", family="z_image", prediction="flow", schedule="simple", steps=8,
    made_for=(8,), sampler="res_multistep", shift=3.0, names=r"z[-_ ]?image.*turbo",
    shown=(1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3), source=f"{TEMPLATES}image_z_image_turbo.json",
)  # fmt: skip

# The first row of a family whose pattern is in a file name wins: narrow patterns before wide ones.
ROWS = (
    SD3,
    replace(SD3, id="hyper_sd3_cfg", title="Hyper-SD for SD 3, CFG-preserved", steps=8, made_for=(4, 8, 16), cfg=5.0,
            cfg_at=((1, 3.0), (8, 5.0), (16, 7.0)), lora="Hyper-SD3-8steps-CFG-lora", lora_strength=0.125,
            names=r"hyper[-_ ]?sd[-_ ]?3.*?(?P<steps>\d+)[-_ ]?step", source=HYPER,
            shown=(1.0, 0.9475, 0.8828, 0.8008, 0.6938, 0.548, 0.338, 0.0089)),
    SCHNELL,
    HYPER_FLUX,
    replace(HYPER_FLUX, id="flux_turbo_alpha", title="FLUX.1-Turbo-Alpha", made_for=(8,), lora="FLUX.1-Turbo-Alpha",
            names=r"turbo[-_ ]?alpha", lora_strength=1.0, source=f"{HF}alimama-creative/FLUX.1-Turbo-Alpha"),
    FLUX,
    replace(KLEIN, id="flux2_klein_base", title="FLUX.2-klein base (not distilled)", steps=20,
            made_for=tuple(range(20, 51)), cfg=5.0, names=r"klein.*base|base.*klein",
            shown=(1.0, 0.9942, 0.9878, 0.9808, 0.973, 0.9643, 0.9546, 0.9436, 0.9311, 0.9167, 0.9001, 0.8805, 0.8572,
                   0.8291, 0.7942, 0.7501, 0.6925, 0.6138, 0.5002, 0.3216)),
    KLEIN,
    replace(KLEIN, id="flux2_dev_turbo", title="FLUX.2-dev with Turbo LoRA", steps=8, made_for=(8,), guidance=4.0,
            names=r"flux[-_. ]?2.*turbo", lora="Flux_2-Turbo-LoRA_comfyui",
            source=f"{TEMPLATES}image_flux2_text_to_image.json",
            shown=(1.0, 0.9854, 0.9666, 0.9415, 0.9062, 0.8528, 0.763, 0.5798)),
    replace(QWEN, id="qwen_2512_turbo", title="Qwen-Image-2512 Turbo (Wuli)", steps=2, made_for=(2,),
            shown=(1.0, 0.75), names=r"wuli|2512[-_ ]?turbo", lora="Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0",
            source=f"{TEMPLATES}image_qwen_image_2512_with_2steps_lora.json"),
    QWEN,
    Z_IMAGE,
    replace(Z_IMAGE, id="krea2_turbo", title="Krea 2 Turbo", family="krea2", sampler="euler", shift=None, shown=FLUX_8,
            names=r"krea[-_ ]?2.*turbo", source=f"{TEMPLATES}image_krea2_turbo_t2i.json"),
    replace(Z_IMAGE, id="lens_turbo", title="Lens Turbo", family="lens", sampler="euler", shift=None, size_shift=True,
            steps=4, made_for=(4,), shown=FLUX_4, names=r"lens.*turbo", source=f"{TEMPLATES}image_lens_turbo_t2i.json"),
    replace(Z_IMAGE, id="ernie_turbo", title="ERNIE-Image Turbo", family="ernie", sampler="euler", shift=None,
            names=r"ernie.*turbo", source=f"{TEMPLATES}image_ernie_image_turbo.json"),
    replace(Z_IMAGE, id="mage_flow_turbo", title="Mage-Flow Turbo", family="mage_flow", sampler="euler", shift=None,
            steps=4, made_for=(4,), shown=(1.0, 0.9474, 0.8571, 0.6667), names=r"mage[-_ ]?flow.*turbo",
            source=f"{TEMPLATES}image_mage_flow_turbo_t2i_int8.json"),
    replace(Z_IMAGE, id="boogu_turbo", title="Boogu-Image Turbo", family="boogu", schedule="sgm_uniform",
            sampler="lcm", shift=None, steps=4, made_for=(4,), shown=(1.0, 0.9049, 0.7608, 0.5161),
            names=r"boogu.*turbo", source=f"{TEMPLATES}image_boogu_image_0_1_turbo_t2i.json"),
)  # fmt: skip
