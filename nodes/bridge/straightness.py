"""Measures how straight a MODEL's trajectories are, on a run of ComfyUI's own Euler sampler."""

from __future__ import annotations

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import latent_preview
import numpy as np
import torch

from ...profiling import chart
from ...sampling.straightness import Straightness, flow_velocity, measure


def straightness(model, conditioning: tuple, latent: dict, steps: int, cfg: float, seed: int) -> Straightness:
    """S(Z) over the latents of ``latent`` (its batch is the Monte-Carlo sample), each drawn in ``steps`` Euler steps.

    ``conditioning``: (positive, negative). The pictures start from pure noise; what the latents hold does not matter.
    """
    samples = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    )
    model_sampling = model.get_model_object("model_sampling")
    flow = isinstance(model_sampling, comfy.model_sampling.CONST)
    sigmas = comfy.samplers.calculate_sigmas(model_sampling, "simple", steps).cpu()
    velocities, times, show = [], [], latent_preview.prepare_callback(model, steps)

    def record(step: int, x0: torch.Tensor, x: torch.Tensor, total: int) -> None:
        v, t = flow_velocity(x.float(), x0.float(), float(sigmas[step]), flow)
        velocities.append(v.cpu())
        times.append(t)
        show(step, x0, x, total)

    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    euler = comfy.samplers.sampler_object("euler")
    comfy.sample.sample_custom(
        model, noise, cfg, euler, sigmas, *conditioning, torch.zeros_like(samples), callback=record, seed=seed
    )
    return measure(velocities, [*times, 0.0])


def drawn(found: Straightness) -> torch.Tensor:
    """The chart as an IMAGE (1, H, W, 3): bars of the squared deviation along the way."""
    rows = [(f"t = {t:.3f}", d, f"{d:.4g}", 0) for t, d in found.bins()]
    image = chart.bars(f"straightness S(Z) = {found.value:.4g}, {found.share:.1%} of the squared velocity", rows)
    return torch.from_numpy(np.asarray(image, np.float32) / 255)[None]
