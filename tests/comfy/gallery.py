"""The gallery: workflows/<name>.json (what the front end opens) and <name>.jpg (what it gives), from workflows/api.

Also the subgraph blueprints. `python tests/comfy/gallery.py [NAME ...]` starts ComfyUI, draws each graph, runs those on
the demo model, and writes both files. What a workflow is for is said once, in `NOTES`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from blueprints import BLUEPRINTS, draw
from PIL import Image
from workflow_tools import to_ui

ROOT = Path(__file__).resolve().parents[2]
API, GALLERY = ROOT / "workflows" / "api", ROOT / "workflows"
THUMBNAIL = 512
# name -> (what to expect, the node whose picture is the thumbnail; None: it needs a model to download)
NOTES: dict[str, tuple[str, str | None]] = {
    "quickstart": ("# Quickstart\nDraws a red apple with the small model that ships with this pack, in 4 bits. Nothing "
        "to download; a few seconds on a CPU. Change the text: *fox face*, *rocket*, *hot beverage* ...", "7"),
    "calibrate": ("# Calibrate your own 4-bit model\nSamples 8 prompts, watches every layer, solves it, and saves the "
        "model to output/diffusion_models. The picture shows before and after from the same noise. For your own "
        "checkpoint, put its loader in place of the demo's.", "13"),
    "compare": ("# 16 bits against 4 bits\nThe same pictures twice: how far apart they are, how long each took, what "
        "each weighs. White in the heat map is a difference of a quarter of the range or more.", "14"),
    "profile": ("# Where the time and the memory went\nThe profiler goes last; Will it Fit? says before a run whether "
        "it will fit.", "8"),
    "few-step": ("# Four steps instead of 25\nThe sampler finds the preset that belongs to the model's LoRA. Below: "
        "the same with the parts that it is made of.", "8"),
    "few-step-parts": ("# Few steps by hand\nSigmas from a list of timesteps, and the TCD sampler. The chart shows how "
        "straight the path is.", "9"),
    "domain": ("# A domain\nTwo words become a prompt, LoRA, sampler and size of one kind of picture. Change the "
        "domain and the subject.", "6"),
    "domain-prompts": ("# Prompts of a domain\nOne prompt with its choices open, and a list of different ones for "
        "calibration or a batch.", "8"),
    "lora-stack": ("# LoRAs on a 4-bit model\nThey lengthen the 16-bit branch beside the 4-bit weights; nothing is "
        "rounded again, and order does not matter.", "11"),
    "sdxl-turbo": ("# SDXL-Turbo in one step\nNeeds sd_xl_turbo_1.0_fp16 (6.9 GB).", None),
    "lcm-lora-sd15": ("# SD1.5 in four steps with the LCM LoRA\nNeeds SD1.5 and its LCM LoRA.", None),
    "flux-schnell": ("# FLUX.1-schnell in four steps\nNeeds flux1-schnell-fp8 (17 GB).", None),
    "lcm-dreamshaper": ("# LCM Dreamshaper with its own guidance\nThe guidance scale goes into the model as an "
        "embedding: one evaluation a step.", None),
    "instaflow": ("# InstaFlow: one straight step\nA rectified flow in SD1.5's UNet. Needs the unet of "
        "huggingface.co/XCLiu/instaflow_0_9B_from_sd_1_5 in models/diffusion_models, under the name below.", None),
    "perflow-sdxl": ("# PeRFlow SDXL in six steps\nThe way from noise to picture in four straight pieces.", None),
    "load-nunchaku": ("# A file made by another tool\nNunchaku, Nunchaku Lite, NF4 and GGUF files load as they are, "
        "codes untouched; Convert 4-bit File writes them in ComfyUI's own layout. Needs nunchaku's "
        "FLUX.1-schnell.", None),
    "image-to-image": ("# From a picture to a picture\nThe 4-bit model noises the first picture to 70 % and draws the "
        "second from there. Put *Load Image* in place of the first sampler for a picture of yours.", "12"),
    "inpaint": ("# Drawing a part anew\nOnly what the mask covers is drawn; the rest stays to the pixel. Put *Load "
        "Image* in place of the first sampler, and paint the mask with the mask editor.", "17"),
    "controlnet-sketch": ("# A sketch steers a 4-bit model\nSD1.5 is calibrated to 4 bits in the graph (once; save "
        "it with Save Model), and ComfyUI's own ControlNet nodes work on it. Needs SD1.5 and its scribble "
        "ControlNet.", None),
    "controlnet-depth": ("# A depth map steers a 4-bit model\nAs with a sketch. Needs SD1.5 and its depth ControlNet.",
        None),
    "train-lora": ("# A LoRA of your own\nTrains on 48 captioned pictures, on the 4-bit model, which stays as it "
        "is; two to five minutes on a CPU. Put your folder in input/ and choose it.", "11"),
    "distill": ("# Fewer steps, trained here\nLatent consistency distillation of the 4-bit model from its 16-bit "
        "teacher, into a LoRA. A minute or two on a CPU; real models want thousands of updates.", "14"),
    "refine": ("# Closer to the original\nTunes scales and low-rank factors of the 4-bit model against the 16-bit "
        "one. Below: LoftQ, a 4-bit base and a LoRA whose sum is closest.", "16"),
    "checkpoint-4bit": ("# A whole checkpoint in 4 bits\nModel, CLIP and VAE from one file. Make it once: *nibble "
        "quantize v1-5-pruned-emaonly-fp16.safetensors --out models/checkpoints/sd15-4bit.safetensors*.", None),
    "convert": ("# A published 4-bit file in ComfyUI's own layout\nInspect Model File says what a file is and who "
        "wrote it; Convert 4-bit File writes it again under ComfyUI's names, codes untouched. Needs "
        "nunchaku's FLUX.1-schnell.", None),
    "compare-runs": ("# Two saved runs, side by side\nRun *profile* twice with other settings first, then choose the "
        "two reports.", None),
    "slim": ("# A slimmer UNet, in 4 bits\nFewer keys in self-attention, a cheaper form of 3x3 convolutions; the "
        "report says what each block saves and costs. Left without, then with, then how they differ. For SD1.5 and "
        "SDXL, put their loader in place of the demo's.", "13"),
    "prompt-set": ("# Prompts of a published list\nSome to calibrate with, others to evaluate with, no picture in "
        "both. Needs MJHQ-30K's meta_data.json in input/; the node says where it is published.", None),
    "image-prompt": ("# A picture as a prompt\nAn IP-Adapter reads an apple, and the heart takes its colour. For SD1.5 "
        "and SDXL, put their loader, CLIP vision and adapter in place of the demo's.", "16"),
    "uni-controlnet": ("# A picture as four more words\nNeeds a 4-bit SD1.5 (see *checkpoint-4bit*), CLIP ViT-L/14's "
        "picture half and Uni-ControlNet's global adapter, converted as the node's help says.", None),
    "scores": ("# Scores of a batch\nHow near pictures are to their prompt, by the demo's own CLIP. For real models, "
        "load a CLIP with its projection and the CLIP vision that belongs to it.", "11"),
}  # fmt: skip


def versions() -> dict[str, tuple[str, str]]:
    """python module prefix -> (registry id, version), as the front end keeps them in a node's properties."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    own = next(line.split('"')[1] for line in text.splitlines() if line.startswith("version"))
    return {"custom_nodes.ComfyUI-Nibble": ("nibble-4bit", own), "": ("comfy-core", "0.33.0")}


def api(name: str) -> dict:
    return json.loads((API / f"{name}.json").read_text(encoding="utf-8"))


def drawn(name: str, object_info: dict) -> dict:
    """The UI-format workflow of ``name``."""
    graph = api(name)
    models = {k: n["_meta"]["models"] for k, n in graph.items() if n["_meta"].get("models")}
    return to_ui(graph, object_info, versions(), [NOTES[name][0]], models)


def thumbnail(picture: np.ndarray) -> Image.Image:
    """(H, W, 3) in [0, 1] -> at most `THUMBNAIL` pixels wide; small pictures are enlarged by whole numbers."""
    image = Image.fromarray((picture * 255).round().astype(np.uint8))
    factor = max(1, THUMBNAIL // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def main() -> None:
    from conftest import start

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(NOTES))
    names = parser.parse_args().names
    with tempfile.TemporaryDirectory() as base:
        server = start(Path(base))
        try:
            info = server.get("/object_info")
            for title, blueprint in BLUEPRINTS.items():
                text = json.dumps(draw(blueprint, info, versions()), indent=1)
                (ROOT / "subgraphs" / f"{title}.json").write_text(text + "\n", encoding="utf-8")
            for name in names:
                text = json.dumps(drawn(name, info), indent=1, ensure_ascii=False)
                (GALLERY / f"{name}.json").write_text(text + "\n", encoding="utf-8")
                picture = NOTES[name][1]
                if picture is not None:
                    image = thumbnail(server.image(server.done(api(name)), picture))
                    image.save(GALLERY / f"{name}.jpg", quality=88, optimize=True)
                print(name)
        finally:
            server.process.terminate()
            server.process.wait(30)


if __name__ == "__main__":
    main()
