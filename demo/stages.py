"""The four training stages of the demo model, each a loss and a plan (`training.loop` runs them).

1. autoencoder   pictures of both styles, 64 x 64 crops, then whole pictures
2. denoiser      UNet and text encoder together on the Noto latents, epsilon prediction, min-SNR weights (2303.09556)
3. few steps     a LoRA on the UNet, latent consistency distillation (2310.04378, section 4.2)
4. flat style    a LoRA on the UNet: 32 emoji in their Twemoji latents, the others as they were; half of its steps
beside
                 the few-step LoRA, so that the two can be added
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F

from ..training.consistency import Consistency, pseudo_huber
from ..training.denoise import Denoiser, diffusers_unet
from ..training.loop import Plan, train
from . import dataset, parts

AUTOENCODER = Plan("autoencoder", steps=5200, batch=32, lr=1e-3, ema=0.998, seed=1)
DENOISER = Plan("denoiser", steps=7600, batch=64, lr=6e-4, warmup=200, ema=0.9993, seed=2)
STYLE = Plan("style", steps=1100, batch=40, lr=1e-3, weight_decay=0.0, ema=0.99, seed=3)
FEW_STEPS = Plan("few_steps", steps=1400, batch=32, lr=1e-3, weight_decay=0.0, ema=0.99, seed=4)

LATENT_NOISE = 0.05  # the decoder learns to forgive what a sampler leaves behind
CAPTION_DROPOUT = 0.1
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
LORA_RANK = 8
STYLE_SHARE = 0.75  # of a batch is in the flat style; the rest holds what the base knows in place


def images(pictures) -> torch.Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def autoencoder(pictures: torch.Tensor, work: Path, device: str):
    """Trained AutoencoderTiny. ``pictures`` (n, 3, 128, 128). The loss keeps latents near mean 0, deviation 1."""
    torch.manual_seed(AUTOENCODER.seed)
    model = parts.autoencoder().to(device, memory_format=torch.channels_last).train()
    whole_from = int(AUTOENCODER.steps * 0.7)

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        side = 64 if step < whole_from else dataset.SIZE
        n = AUTOENCODER.batch * 64**2 // side**2
        pick = torch.randint(len(pictures), (n,), generator=g)
        at = torch.randint((dataset.SIZE - side) // 8 + 1, (n, 2), generator=g) * 8
        crops = [pictures[i, :, y : y + side, x : x + side] for i, (y, x) in zip(pick, at.tolist(), strict=True)]
        x = torch.stack(crops).to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, dtype=torch.bfloat16):
            z = model.encoder(x).float()
            noise = torch.randn(z.shape, generator=g).to(device) * LATENT_NOISE
            y = model.decoder(z + noise).float()
        mean, deviation = z.mean((0, 2, 3)), z.std((0, 2, 3))
        shape = mean.square().mean() + (deviation - 1).square().mean()
        return F.mse_loss(y, x) + 0.05 * F.l1_loss(y, x) + 0.002 * shape

    seconds = train(AUTOENCODER, list(model.parameters()), loss, work).seconds
    return model.eval().to(memory_format=torch.contiguous_format), seconds


@torch.no_grad()
def encode(model, pictures: torch.Tensor, device: str) -> torch.Tensor:
    """(n, 4, 16, 16) float32 latents, unscaled."""
    return torch.cat([model.encoder(b.to(device)).cpu() for b in pictures.split(32)])


def view(unet) -> Denoiser:
    """A demo UNet as the trainer sees it."""
    from diffusers import DDIMScheduler

    return diffusers_unet(unet, DDIMScheduler(**parts.SCHEDULER))


def conds(context: torch.Tensor, **attention: torch.Tensor) -> list[dict]:
    """The trainer's conditions of a batch. ``context``, ``attention``: (B, ...)."""
    rows = [{name: value[i : i + 1] for name, value in attention.items()} for i in range(len(context))]
    return [{"context": c, **({"attention": r} if r else {})} for c, r in zip(context.split(1), rows, strict=True)]


def drawn(model: Denoiser, x0: torch.Tensor, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(noise like ``x0``, sigma (B,)) at random timesteps, on the model's device."""
    t = torch.randint(len(model.sigmas), (len(x0),), generator=g)
    noise = torch.randn(x0.shape, generator=g)
    return noise.to(model.device), model.sigmas[t].to(model.device)


class Captions:
    """Training captions of the pictures in a batch as token ids; draws are a function of the generator alone."""

    def __init__(self, emoji: list[dataset.Emoji], tokenizer, style: bool = False):
        self.emoji, self.tokenizer, self.style = emoji, tokenizer, style

    def __call__(self, pick: torch.Tensor, g: torch.Generator, drop: float = CAPTION_DROPOUT) -> torch.Tensor:
        rng = random.Random(int(torch.randint(2**62, (), generator=g)))
        texts = [dataset.phrase(self.emoji[i], rng, self.style) for i in pick.tolist()]
        return parts.token_ids(self.tokenizer, ["" if rng.random() < drop else t for t in texts])


def denoiser(emoji, latents: torch.Tensor, tokenizer, work: Path, device: str):
    """(UNet, text encoder, seconds), trained together on scaled ``latents`` (n, 4, 16, 16)."""
    torch.manual_seed(DENOISER.seed)
    unet, text = parts.unet().to(device).train(), parts.text_encoder(tokenizer).to(device).train()
    model, captions = view(unet), Captions(emoji, tokenizer)

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        pick = torch.randint(len(latents), (DENOISER.batch,), generator=g)
        x0 = latents[pick].to(device)
        noise, sigma = drawn(model, x0, g)
        context = text(captions(pick, g).to(device)).last_hidden_state
        return model.loss(x0, noise, sigma, conds(context))

    seconds = train(DENOISER, [*unet.parameters(), *text.parameters()], loss, work).seconds
    return unet.eval(), text.eval(), seconds


def add_lora(unet, seed: int):
    """The parameters of a new LoRA (peft) on every attention and feed-forward linear; all others are frozen."""
    from peft import LoraConfig

    torch.manual_seed(seed)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_TARGETS), "demo")
    return [p for name, p in unet.named_parameters() if ".demo." in name]


def style_lora(unet, text, captions: Captions, latents: torch.Tensor, learn: list[int], work: Path, device: str):
    """Trains a LoRA into ``unet``; returns seconds. ``latents`` (n, 4, 16, 16): row i of ``learn`` in the second style,
    every other row in the first. A LoRA this small holds some 50 pictures; asked for all 1,026 it draws their mean.

    ``unet`` has the few-step LoRA as adapter "lcm". With it the UNet's clean picture counts, as few-step samplers use
    it.
    """
    params = add_lora(unet, STYLE.seed)
    model, chosen = view(unet), torch.tensor(learn)
    others = torch.tensor([i for i in range(len(latents)) if i not in set(learn)])

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        styled = torch.rand(STYLE.batch, generator=g) < STYLE_SHARE
        draw = torch.rand(STYLE.batch, generator=g)
        pick = torch.where(styled, chosen[(draw * len(chosen)).long()], others[(draw * len(others)).long()])
        x0 = latents[pick].to(device)
        noise, sigma = drawn(model, x0, g)
        with torch.no_grad():
            cond = conds(text(captions(pick, g).to(device)).last_hidden_state)
        if step % 2 == 0:
            unet.set_adapters(["demo"])
            return model.loss(x0, noise, sigma, cond)
        unet.set_adapters(["demo", "lcm"])
        return pseudo_huber(model.predict(model.mix(x0, noise, sigma), sigma, cond) - x0, Consistency.huber)

    return train(STYLE, params, loss, work).seconds
