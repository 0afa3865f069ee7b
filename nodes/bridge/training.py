"""Trains a LoRA on a MODEL inside a workflow: pictures and captions to latents and conditions, then the trainer."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import latent_preview
import torch

from ...training import data, lora
from ...training.chart import loss_chart
from ...training.job import Base, file_bytes
from ...training.loop import Watch
from ...training.recipes import Lora
from ...writing.room import check_room
from . import outputs, selfcheck, train_model
from .calibrate import tell

EVERY = 2.0  # seconds between two charts on the node
SEEN = 96  # pixels across of the preview in it


def train(parts: tuple, folder: Path, row: Lora, out: Path, node_id: str | None = None):
    """(MODEL with the LoRA, report, PIL chart). ``parts``: MODEL, CLIP, VAE. ``out``: the file to write.

    A stopped run's state is kept under output/ until the same run ends. Raises ValueError in one sentence for a folder
    that cannot be trained on, a model that cannot be, or a disk without room. Where ``out`` cannot be written in the
    end, see `outputs.save`.
    """
    selfcheck.require()
    model, clip, vae = parts
    found = data.examples(folder)
    target = train_model.resident(model)
    check_room(out, file_bytes(target.model.diffusion_model, row.rank))
    texts = _encoded(clip, [e.caption for e in found], node_id)
    latents, digest = _latents(vae, found, row.side, target, node_id), train_model.digest_of(model)
    with train_model.placed(target, row.compress):
        samples = [_sample(target, z, texts[e.caption], texts[""]) for z, e in zip(latents, found, strict=True)]
        live = Live(target, row.updates, node_id)
        base = live.seen(train_model.base_of(target, digest))
        made = lora.run(base, samples, found, row, outputs.place(out), Watch(live.step, live.check))
    trained, _ = comfy.sd.load_lora_for_models(model, None, made.tensors, 1.0, 0.0)
    return trained, outputs.with_notes(made.text, made.notes), loss_chart(made.losses, "loss", row.updates)


def _encoded(clip, captions: list[str], node_id: str | None) -> dict[str, list]:
    """caption -> conditioning, each once, the empty one among them."""
    out = {}
    for text in dict.fromkeys(["", *captions]):
        mm.throw_exception_if_processing_interrupted()
        tell(node_id, f"encoding captions: {len(out) + 1}")
        out[text] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return out


def _latents(vae, found: list[data.Example], side: int, model, node_id: str | None) -> list[torch.Tensor]:
    """(C, h, w) float32 on the CPU of every picture, as the diffusion model sees them."""
    out = []
    for i, example in enumerate(found):
        mm.throw_exception_if_processing_interrupted()
        tell(node_id, f"encoding picture {i + 1} of {len(found)}")
        picture = data.fitted(example.path, side).add(1).div(2).movedim(0, -1)
        z = model.model.process_latent_in(vae.encode(picture[None]))
        if z.dim() != 4:
            raise ValueError("This model makes videos, and only models of pictures are trained here")
        out.append(z[0].float().cpu())
    return out


def _sample(model, latent: torch.Tensor, cond: list, empty: list) -> data.Sample:
    latent = train_model.clean(latent)
    return data.Sample(latent, train_model.condition(model, cond, latent), train_model.condition(model, empty, latent))


class Live:
    """What the node shows while it trains: its bar, a line of text, the loss so far with what the model makes of the
    batch's first picture (ComfyUI's own preview, where it is switched on).
    """

    def __init__(self, model, total: int, node_id: str | None):
        self.node_id, self.losses, self.start, self.drawn = node_id, [], time.monotonic(), 0.0
        self.bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self.last = None

    def check(self) -> None:
        mm.throw_exception_if_processing_interrupted()

    def seen(self, base: Base) -> Base:
        """``base``, whose last picture is kept for the preview."""

        def predict(x, sigma, conds):
            out = base.denoiser.predict(x, sigma, conds)
            self.last = out[:1].detach()
            return out

        return replace(base, denoiser=replace(base.denoiser, predict=predict))

    def tell(self, what: str, done: int, total: int) -> None:
        self.check()
        tell(self.node_id, f"{what}: {done} of {total}")

    def step(self, done: int, total: int, loss: float) -> None:
        now = time.monotonic()
        self.losses.append(loss)
        left = (now - self.start) / len(self.losses) * (total - done)
        recent = self.losses[-20:]
        tell(self.node_id, f"step {done} of {total}: loss {sum(recent) / len(recent):.4f}, {left:.0f} s left")
        preview = None
        if now - self.drawn >= EVERY:
            self.drawn = now
            preview = ("JPEG", self._picture(done, total), 640)
        self.bar.update_absolute(done, total, preview)

    def _picture(self, done: int, total: int):
        chart = loss_chart(self.losses, f"loss, step {done} of {total}", total)
        if self.previewer is not None and self.last is not None:
            seen = self.previewer.decode_latent_to_preview(self.last.float())
            seen = seen.resize((SEEN, round(SEEN * seen.height / seen.width)))
            chart.paste(seen, (chart.width - SEEN - 20, 40))
        return chart
