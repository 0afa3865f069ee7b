"""Latent consistency distillation of the demo model into a LoRA (LCM: arXiv 2310.04378; LCM-LoRA: 2311.05556): the
trainer's loss (training/consistency.py) on the demo's pictures and captions.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..training import consistency, paths
from ..training.loop import train
from . import parts
from .stages import FEW_STEPS, Captions, add_lora, conds, view

SETTINGS = consistency.Consistency(omega=(1.0, 2.5))


def lcm_lora(unet, teacher, text, emoji, latents: torch.Tensor, tokenizer, work: Path, device: str) -> float:
    """Trains the LCM LoRA into ``unet``; ``teacher`` is the same base, frozen. Returns seconds."""
    params = add_lora(unet, FEW_STEPS.seed)
    (model, path), (guide, _) = paths.view(view(unet)), paths.view(view(teacher.requires_grad_(False).eval()))
    student, captions = consistency.Student(model, model), Captions(emoji, tokenizer)
    with torch.no_grad():
        empty = conds(text(parts.token_ids(tokenizer, [""]).to(device)).last_hidden_state) * FEW_STEPS.batch

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        pick = torch.randint(len(latents), (FEW_STEPS.batch,), generator=g)
        x = latents[pick].to(device)
        drawn = consistency.draw(x, path, SETTINGS, g)
        with torch.no_grad():
            cond = conds(text(captions(pick, g, drop=0.0).to(device)).last_hidden_state)
        return consistency.lcd(student, guide, consistency.Batch(x, cond, empty), drawn, path, SETTINGS)

    return train(FEW_STEPS, params, loss, work).seconds
