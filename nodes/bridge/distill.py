"""Distils a MODEL inside a workflow into a LoRA for few steps: conditions and latents in, the trainer, a file out."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import comfy.model_management as mm
import comfy.sample
import comfy.sd
import torch

from ...checkpoints.save import fingerprint
from ...reading import textfile
from ...training import distill as core
from ...training.chart import loss_chart
from ...training.job import file_bytes
from ...training.loop import Watch
from ...training.recipes import Distill
from ...writing.room import check_room
from . import outputs, selfcheck, train_model
from .calibrate import Inputs, encode, of_conditions, split
from .training import Live


def given(latent: torch.Tensor, clip, text: str, negative: str, positive, negative_cond) -> Inputs:
    """What a node was given, either way. Raises ValueError for no prompts."""
    if positive is not None:
        return Inputs(split(positive, negative_cond), latent)
    lines = textfile.lines(text)
    if clip is None or not lines:
        raise ValueError("Connect CLIP and write prompts, one a line, or connect positive")
    return Inputs(encode(clip, lines, negative), latent)


def distill(models: tuple, inputs: Inputs, row: Distill, out: Path, node_id: str | None = None):
    """(MODEL with the LoRA, report, PIL chart). ``models``: (MODEL, teacher or None for the model itself). ``out``: the
    LoRA file to write.

    A stopped run's pairs and state are kept under output/ until the same run ends. Raises ValueError in one sentence
    for inputs that do not fit the way, or a disk without room. Where ``out`` cannot be written in the end, see
    `outputs.save`.
    """
    selfcheck.require()
    model, _ = models
    check_room(out, file_bytes(model.model.diffusion_model, row.rank))
    loaded = [(train_model.resident(m), train_model.digest_of(m)) for m in models if m is not None]
    mm.load_models_gpu([m for m, _ in loaded], force_full_load=True)
    live = Live(loaded[0][0], row.updates, node_id)
    with ExitStack() as stack:
        for m, _ in loaded:
            stack.enter_context(train_model.learning(m))
        base, *teacher = (train_model.base_of(*m) for m in loaded)
        bases = live.seen(base), next(iter(teacher), None)
        watch = Watch(live.step, live.check)
        made = core.run(bases, _learned(loaded[0][0], inputs), row, outputs.place(out), watch, live.tell)
    trained, _ = comfy.sd.load_lora_for_models(model, None, made.tensors, 1.0, 0.0)
    trained.set_attachments("lora_metadata", made.info)  # so that Few-Step Sampler knows it
    return trained, outputs.with_notes(made.text, made.notes), loss_chart(made.losses, "loss")


def _learned(model, inputs: Inputs) -> core.Prompts:
    shape, pictures = latents(model, inputs.latent)
    of_inputs = fingerprint({"latent": inputs.latent, **of_conditions(inputs.pairs)})
    return core.Prompts(*conditions(model, inputs.pairs, shape), shape, pictures, of_inputs)


def conditions(model, pairs: tuple, shape: tuple[int, ...]) -> tuple[list, object]:
    """(one condition a prompt, the first prompt's negative one) for latents of ``shape``."""
    like = torch.zeros(shape)
    found = [train_model.condition(model, positive, like) for positive, _ in pairs]
    return found, train_model.condition(model, pairs[0][1], like)


def latents(model, samples: torch.Tensor) -> tuple[tuple[int, ...], torch.Tensor | None]:
    """(shape of one latent, the pictures as the model has them or None for an empty latent)."""
    empty = not bool(samples.any())
    samples = train_model.clean(comfy.sample.fix_empty_latent_channels(model, samples))
    if samples.dim() != 4:
        raise ValueError("This model makes videos, and only models of pictures are trained here")
    pictures = None if empty else model.model.process_latent_in(samples.clone().float()).cpu()
    return tuple(samples.shape[1:]), pictures
