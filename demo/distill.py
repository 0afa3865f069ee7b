"""Latent consistency distillation of the demo model into a LoRA (LCM: arXiv 2310.04378; LCM-LoRA: 2311.05556).

    f(z, t) = c_skip(t) z + c_out(t) x0(z, t)      c_skip = s^2 / ((10 t)^2 + s^2), c_out = 10 t / sqrt((10 t)^2 + s^2)
    loss    = huber(f_student(z_t, t), f_student(z_t', t') held fixed)
    z_t'    = one guided DDIM step of the frozen teacher from z_t, t' = t - 20

Timesteps are the 50-point grid 19, 39 ... 999, so 1 to 8 steps of ComfyUI's and diffusers' LCM samplers land on it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..training.loop import train
from . import parts
from .stages import FEW_STEPS, Captions, add_lora, schedule

GRID, SKIP = 50, 20
SIGMA_DATA, SCALING = 0.5, 10.0
OMEGA = (1.0, 2.5)  # guidance scale minus 1, drawn per picture
HUBER = 1e-3


def boundary(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(c_skip, c_out), each (B, 1, 1, 1), for integer timesteps ``t`` (B,)."""
    s = (SCALING * t.float()).view(-1, 1, 1, 1)
    scale = s**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / scale, s / scale.sqrt()


def lcm_lora(unet, teacher, text, emoji, latents: torch.Tensor, tokenizer, work: Path, device: str) -> float:
    """Trains the LCM LoRA into ``unet``; ``teacher`` is the same base, frozen. Returns seconds."""
    params = add_lora(unet, FEW_STEPS.seed)
    teacher.requires_grad_(False).eval()
    alphas, captions = schedule(device), Captions(emoji, tokenizer)
    with torch.no_grad():
        empty = text(parts.token_ids(tokenizer, [""]).to(device)).last_hidden_state

    def predict(net, z, t, context):
        eps = net(z, t, context).sample
        a = alphas[t].view(-1, 1, 1, 1)
        return eps, (z - (1 - a).sqrt() * eps) / a.sqrt()

    def consistency(net, z, t, context):
        skip, out = boundary(t)
        return skip * z + out * predict(net, z, t, context)[1]

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        b = FEW_STEPS.batch
        pick = torch.randint(len(latents), (b,), generator=g)
        t = ((torch.randint(GRID, (b,), generator=g) + 1) * SKIP - 1).to(device)
        earlier = (t - SKIP).clamp(min=0)
        omega = (OMEGA[0] + (OMEGA[1] - OMEGA[0]) * torch.rand(b, generator=g)).view(-1, 1, 1, 1).to(device)
        noise = torch.randn(b, *latents.shape[1:], generator=g).to(device)
        a, a_prev = alphas[t].view(-1, 1, 1, 1), alphas[earlier].view(-1, 1, 1, 1)
        z = a.sqrt() * latents[pick].to(device) + (1 - a).sqrt() * noise
        with torch.no_grad():
            context = text(captions(pick, g, drop=0.0).to(device)).last_hidden_state
            both = torch.cat([context, empty.expand(b, -1, -1)])
            eps, x0 = predict(teacher, torch.cat([z, z]), torch.cat([t, t]), both)
            eps_c, eps_u = eps.chunk(2)
            x0_c, x0_u = x0.chunk(2)
            x0 = x0_c + omega * (x0_c - x0_u)
            eps = eps_c + omega * (eps_c - eps_u)
            z_prev = a_prev.sqrt() * x0 + (1 - a_prev).sqrt() * eps
            target = consistency(unet, z_prev, earlier, context)
        difference = consistency(unet, z, t, context) - target
        return ((difference**2 + HUBER**2).sqrt() - HUBER).mean()

    return train(FEW_STEPS, params, loss, work).seconds
