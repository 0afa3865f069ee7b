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


def schedule(device: str) -> torch.Tensor:
    """(1000,) float32 cumulative alphas of SD's scaled-linear betas."""
    s = parts.SCHEDULER
    betas = (
        torch.linspace(s["beta_start"] ** 0.5, s["beta_end"] ** 0.5, s["num_train_timesteps"], dtype=torch.float64) ** 2
    )
    return torch.cumprod(1 - betas, 0).float().to(device)


class Captions:
    """Training captions of the pictures in a batch as token ids; draws are a function of the generator alone."""

    def __init__(self, emoji: list[dataset.Emoji], tokenizer, style: bool = False):
        self.emoji, self.tokenizer, self.style = emoji, tokenizer, style

    def __call__(self, pick: torch.Tensor, g: torch.Generator, drop: float = CAPTION_DROPOUT) -> torch.Tensor:
        rng = random.Random(int(torch.randint(2**62, (), generator=g)))
        texts = [dataset.phrase(self.emoji[i], rng, self.style) for i in pick.tolist()]
        return parts.token_ids(self.tokenizer, ["" if rng.random() < drop else t for t in texts])


def noised(latents: torch.Tensor, plan: Plan, alphas: torch.Tensor, g: torch.Generator):
    """A batch: (picked rows, x_t, noise, t)."""
    pick = torch.randint(len(latents), (plan.batch,), generator=g)
    return pick, *noise_rows(latents, pick, alphas, g)


def noise_rows(latents: torch.Tensor, pick: torch.Tensor, alphas: torch.Tensor, g: torch.Generator):
    """(x_t, noise, t) of the picked rows."""
    t = torch.randint(len(alphas), (len(pick),), generator=g)
    eps = torch.randn(len(pick), *latents.shape[1:], generator=g)
    a = alphas.cpu()[t].view(-1, 1, 1, 1)
    return a.sqrt() * latents[pick] + (1 - a).sqrt() * eps, eps, t


def epsilon_loss(out: torch.Tensor, eps: torch.Tensor, alpha: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """Mean squared error with min-SNR-gamma weights for epsilon prediction."""
    snr = alpha / (1 - alpha)
    weight = snr.clamp(max=gamma) / snr
    return (weight * (out - eps).square().mean((1, 2, 3))).mean()


def clean_loss(out: torch.Tensor, eps: torch.Tensor, alpha: torch.Tensor, soft: float = 1e-3) -> torch.Tensor:
    """Pseudo-Huber distance of the clean latents that ``out`` and ``eps`` stand for."""
    off = ((1 - alpha) / alpha).sqrt().view(-1, 1, 1, 1) * (out - eps)
    return ((off**2 + soft**2).sqrt() - soft).mean()


def denoiser(emoji, latents: torch.Tensor, tokenizer, work: Path, device: str):
    """(UNet, text encoder, seconds), trained together on scaled ``latents`` (n, 4, 16, 16)."""
    torch.manual_seed(DENOISER.seed)
    unet, text = parts.unet().to(device).train(), parts.text_encoder(tokenizer).to(device).train()
    alphas, captions = schedule(device), Captions(emoji, tokenizer)

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        pick, x, eps, t = noised(latents, DENOISER, alphas, g)
        context = text(captions(pick, g).to(device)).last_hidden_state
        out = unet(x.to(device), t.to(device), context).sample
        return epsilon_loss(out, eps.to(device), alphas[t.to(device)])

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
    alphas, chosen = schedule(device), torch.tensor(learn)
    others = torch.tensor([i for i in range(len(latents)) if i not in set(learn)])

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        styled = torch.rand(STYLE.batch, generator=g) < STYLE_SHARE
        draw = torch.rand(STYLE.batch, generator=g)
        pick = torch.where(styled, chosen[(draw * len(chosen)).long()], others[(draw * len(others)).long()])
        x, eps, t = noise_rows(latents, pick, alphas, g)
        with torch.no_grad():
            context = text(captions(pick, g).to(device)).last_hidden_state
        few = step % 2 == 1
        unet.set_adapters(["demo", "lcm"] if few else ["demo"])
        out, eps, alpha = unet(x.to(device), t.to(device), context).sample, eps.to(device), alphas[t.to(device)]
        return clean_loss(out, eps, alpha) if few else epsilon_loss(out, eps, alpha)

    return train(STYLE, params, loss, work).seconds
