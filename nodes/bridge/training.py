"""Trains a LoRA on a MODEL inside a workflow: pictures and captions to latents and conditions, then the trainer."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import latent_preview
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...checkpoints import resume
from ...checkpoints.save import save
from ...training import data, lora
from ...training.adapters import Adapters, linears
from ...training.chart import loss_chart
from ...training.denoise import Denoiser
from ...training.loop import Plan, Watch
from ...writing.room import check_room
from . import outputs, selfcheck, train_model
from .build import weight_of
from .calibrate import tell

EVERY = 2.0  # seconds between two charts on the node
SEEN = 96  # pixels across of the preview in it
STATES = 8  # a LoRA's size: value, average and adamw's two moments, twice while one state takes the other's place


@dataclass(frozen=True)
class Settings:
    """What the node was set to."""

    steps: int
    batch: int
    rank: int
    rate: float
    side: int
    seed: int
    optimizer: str = "adamw"
    schedule: str = "cosine"
    accumulate: int = 1
    dropout: float = 0.1
    ema: float = 0.99
    hold_out: float = 0.1
    checkpointing: bool = True
    compress: bool = True

    def recipe(self, loss_scale: float) -> lora.Recipe:
        plan = Plan(
            "lora", self.steps, self.batch, self.rate, warmup=min(100, self.steps // 10), weight_decay=0.0,
            ema=self.ema, seed=self.seed, schedule=self.schedule, accumulate=self.accumulate,
            optimizer=self.optimizer, loss_scale=loss_scale,
        )  # fmt: skip
        return lora.Recipe(plan, self.dropout, self.checkpointing)


def train(parts: tuple, folder: Path, settings: Settings, out: Path, node_id: str | None = None):
    """(MODEL with the LoRA, report, PIL chart). ``parts``: MODEL, CLIP, VAE. ``out``: the file to write.

    A stopped run's state is kept under output/ until the same run ends. Raises ValueError in one sentence for a folder
    that cannot be trained on, a model that cannot be, or a disk without room. Where ``out`` cannot be written in the
    end, see `outputs.save`.
    """
    selfcheck.require()
    model, clip, vae = parts
    found = data.examples(folder)
    target = train_model.resident(model)
    size = lora.file_bytes(target.model.diffusion_model, settings.rank)
    check_room(out, size)
    texts = _encoded(clip, [e.caption for e in found], node_id)
    latents = _latents(vae, found, settings.side, target, node_id)
    recipe = settings.recipe(train_model.loss_scale(target))
    run = _signature(model, found, settings), f"Train LoRA, {len(found)} pictures, {settings.steps} steps"
    with (
        outputs.unfinished_run(*run, STATES * size) as kept,
        train_model.placed(target, settings.compress),
    ):
        rows = [_sample(target, z, texts[e.caption], texts[""]) for z, e in zip(latents, found, strict=True)]
        chosen = data.split(len(rows), settings.hold_out, settings.seed)
        samples = tuple([rows[i] for i in part] for part in chosen)
        adapters = _adapters(target, settings)
        live = Live(target, recipe.plan.steps, node_id)
        denoiser = live.seen(train_model.denoiser(target))
        outcome = lora.train_lora(denoiser, adapters, samples, recipe, kept.folder, Watch(live.step, live.check))
        state = adapters.state_dict()
        info = lora.metadata(recipe, outcome, len(found), out.stem)
        note = outputs.save(out, lambda path: save(path, state, info), outcome.result.kept)
        kept.finish()
    trained, _ = comfy.sd.load_lora_for_models(model, None, state, 1.0, 0.0)
    report = lora.report(recipe, outcome, (len(samples[0]), len(samples[1])), len(adapters.factors))
    report = outputs.with_notes(report, [note, *outcome.result.notes, *kept.notes])
    return trained, report, loss_chart(outcome.result.losses, "loss", recipe.plan.steps)


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


def _adapters(model, settings: Settings) -> Adapters:
    module = model.model.diffusion_model
    names = lora.usual(list(linears(module)))
    if not names:
        raise ValueError("This model has no linear layer, and LoRAs are trained on those")
    return Adapters(module, names, settings.rank, seed=settings.seed).to(model.load_device)


def _signature(model, found: list[data.Example], settings: Settings) -> str:
    """Of this very run: same model, pictures, captions and settings."""
    weights = {n: _bytes_of(model, n) for n in linears(model.model.diffusion_model)}
    patches = {str(key): [p[0] for p in value] for key, value in model.patches.items()}
    pictures = [[e.path.name, e.path.stat().st_size, e.path.stat().st_mtime_ns, e.caption] for e in found]
    return resume.signature(weights=resume.fingerprint(weights), pictures=pictures, patches=patches,
                            settings=asdict(settings))  # fmt: skip


def _bytes_of(model, name: str) -> torch.Tensor:
    """What tells a layer's weight from another's: its codes, or itself with its patches."""
    weight = comfy.utils.get_attr(model.model.diffusion_model, f"{name}.weight")
    return weight._qdata if isinstance(weight, QuantizedTensor) else weight_of(model, f"{name}.weight")


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

    def seen(self, denoiser: Denoiser) -> Denoiser:
        """``denoiser``, whose last picture is kept for the preview."""

        def predict(x, sigma, conds):
            out = denoiser.predict(x, sigma, conds)
            self.last = out[:1].detach()
            return out

        return replace(denoiser, predict=predict)

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
