"""A diffusers pipeline as training sees it (training/job.py): its UNet, what captions and pictures become."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import demo
from ..checkpoints.save import fingerprint
from ..lora.apply import rules_of
from ..training import data, denoise
from ..training.distill import Prompts
from ..training.job import Base, digest_of
from ..training.recipes import PRECISIONS
from . import calibrate, few_steps, pipeline


def load(args: argparse.Namespace, precision: str):
    """The pipeline with its denoiser in ``precision``, by the file that ``args`` name where that is 4-bit; it is still
    on the CPU. Raises ValueError for one that has no UNet.
    """
    pipe = pipeline.load_pipeline(args.model or demo.MODEL, args.device, waiting=True)
    if getattr(pipe, "unet", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no UNet, and only those are trained here. Train it in ComfyUI")
    if precision == PRECISIONS[0]:
        if args.quantized is not None:
            pipeline.install_file(pipe, args.quantized)
        else:
            pipeline.quantize(pipe, args.base_rank)
    pipe.unet.requires_grad_(False)
    return pipe


def base_of(pipe) -> Base:
    """The pipeline's UNet, where it is now."""
    unet = pipe.unet
    denoiser = denoise.diffusers_unet(unet, pipe.scheduler)
    return Base(unet, denoiser, unet.dtype, native_names(unet), few_steps.family(pipe), digest_of(unet, {}))


def native_names(unet) -> Callable[[str], str]:
    """A diffusers layer's name -> ComfyUI's, in which LoRA files are written."""
    table = {
        r.sources[0].removesuffix(".weight"): r.native.removesuffix(".weight")
        for r in rules_of(unet)
        if r.native.endswith(".weight") and len(r.sources) == 1
    }
    return lambda name: table.get(name, name)


def side_of(pipe) -> int:
    """The size in pixels that the pipeline's model draws at by default."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


@torch.no_grad()
def latent_of(pipe, picture: Tensor) -> Tensor:
    """(C, h, w) float32 on the CPU of a picture (3, H, W) in [-1, 1]."""
    found = pipe.vae.encode(picture[None].to(pipe.vae.device, pipe.vae.dtype))
    z = found.latents if hasattr(found, "latents") else found.latent_dist.mean
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    return ((z.float() - shift) * pipe.vae.config.scaling_factor)[0].cpu()


@torch.no_grad()
def encode(pipe, caption: str, latent: Tensor) -> dict[str, Tensor]:
    """A caption's condition: the text, and for SDXL its pooled form and the picture's size."""
    found = pipe.encode_prompt(
        caption, device=pipe.vae.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    cond = {"context": found[0].float()}
    if len(found) == 4:
        h, w = (n * pipe.vae_scale_factor for n in latent.shape[-2:])
        sizes = torch.tensor([[h, w, 0, 0, h, w]], dtype=torch.float32, device=pipe.vae.device)
        cond |= {"text_embeds": found[2].float(), "time_ids": sizes}
    return cond


def samples(pipe, folder: Path, side: int) -> list[data.Sample]:
    """The captioned pictures of a folder as latents and conditions."""
    out = []
    for example in data.examples(folder):
        latent = latent_of(pipe, data.fitted(example.path, side))
        out.append(data.Sample(latent, encode(pipe, example.caption, latent), encode(pipe, "", latent)))
    return out


def prompts(pipe, args: argparse.Namespace, pictures: Path | None = None) -> Prompts:
    """What ``args`` name to learn from: texts, or captioned ``pictures``."""
    config = pipe.unet.config
    like = torch.zeros(config.in_channels, config.sample_size, config.sample_size)
    empty, shape = encode(pipe, "", like), tuple(like.shape)
    if pictures is not None:
        found = samples(pipe, pictures, side_of(pipe))
        return _prompts([s.cond for s in found], empty, shape, torch.stack([s.latent for s in found]))
    texts = calibrate.texts(args.prompts, args.domain, args.samples, args.seed)
    return _prompts([encode(pipe, t, like) for t in texts], empty, shape)


def _prompts(cond: list[dict], empty: dict, shape: tuple[int, ...], pictures: Tensor | None = None) -> Prompts:
    seen = {f"{i}.{name}": t for i, one in enumerate([empty, *cond]) for name, t in one.items()}
    return Prompts(cond, empty, shape, pictures, fingerprint(seen if pictures is None else seen | {"x": pictures}))
