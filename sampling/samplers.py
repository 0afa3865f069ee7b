"""The two samplers that ComfyUI lacks, in k-diffusion's contract (see the package): x is VE, data + sigma * noise. And
the guidance inside a full LCM: an embedding that its first time layer adds up, hence a constant bias.

``table`` (1000,) holds the sigma of every timestep 0 ... 999, sigma = sqrt((1 - a) / a) for DDPM's cumulative alpha a.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import trange

from ..families.preset import PERFLOW
from .schedules import TRAIN, WINDOWS

Noise = Callable[[Tensor, Tensor], Tensor]


def seeded_noise(x: Tensor, seed: int | None) -> Noise:
    """Unit noise like x from ``seed``; on a CPU from seed + 1, as k-diffusion's in ComfyUI: never the first noise."""
    generator = None
    if seed is not None:
        generator = torch.Generator(x.device).manual_seed(seed + (x.device.type == "cpu"))
    return lambda _sigma, _next: torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def nearest_timestep(table: Tensor, sigma: Tensor) -> int:
    """The timestep whose sigma in ``table`` is closest to ``sigma`` (a positive scalar), by logarithm."""
    return int((table.log() - sigma.to(table).log()).abs().argmin())


@torch.no_grad()
def sample_tcd(model, x, sigmas, extra_args=None, callback=None, disable=None, *, table, eta=0.3, noise_sampler=None):
    """Trajectory consistency distillation. Source: arXiv 2402.19159, algorithm 4; diffusers TCDScheduler (its gamma).

    From the predicted x0 it goes down to timestep s = floor((1 - eta) t_next) and adds noise up to t_next:
    x = x0 + sigma_s eps + sqrt(sigma_next^2 - sigma_s^2) noise. As there, the last step stops at timestep 0, not at 0
    noise. eta in [0, 1]: 0 adds no noise, 1 nothing but noise.
    """
    extra_args = extra_args or {}
    table = table.to(x.device)
    noise_sampler = noise_sampler or seeded_noise(x, extra_args.get("seed"))
    s_in = x.new_ones([x.shape[0]])
    for i in trange(len(sigmas) - 1, disable=disable):
        denoised = model(x, sigmas[i] * s_in, **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        eps = (x - denoised) / sigmas[i]
        if sigmas[i + 1] == 0:
            # A VP sample at timestep 0 is scaled by sqrt(a) = 1 / sqrt(1 + sigma^2).
            return (denoised + table[0] * eps) / (1 + table[0] ** 2).sqrt()
        down = table[math.floor((1 - eta) * nearest_timestep(table, sigmas[i + 1]))]
        x = denoised + down * eps
        if eta > 0:
            up = (sigmas[i + 1] ** 2 - down**2).clamp(min=0).sqrt()
            x = x + up * noise_sampler(sigmas[i], sigmas[i + 1])
    return x


def window_of(t: float) -> tuple[float, float]:
    """(start, end) of the PeRFlow window that holds time ``t`` in (0, 1]; a window owns its start."""
    end = (math.ceil(round(t * TRAIN) * WINDOWS / TRAIN) - 1) / WINDOWS
    return end + 1 / WINDOWS, end


def perflow_velocity(prediction: str, z: Tensor, eps: Tensor, t: float, alphas: Tensor) -> Tensor:
    """dz/dt at time ``t``: towards the end of t's window. Source: piecewise-rectified-flow scheduler_perflow.py.

    z: VP sample; eps: the network's output; alphas (1000,): cumulative alphas; a window from t_s has alpha[1000 t_s -
    1].
    """
    if prediction == "velocity":
        return eps
    start, end = window_of(t)
    a_s = float(alphas[round(start * TRAIN) - 1])
    a_e = float(alphas[max(round(end * TRAIN) - 1, 0)])
    lam = math.sqrt(a_e / a_s)
    eta = {"ddim_eps": math.sqrt(1 - a_e) - lam * math.sqrt(1 - a_s), "diff_eps": -math.sqrt(1 - a_s / a_e) * lam}
    share = lam * (t - start) + (end - t)
    window_end = (lam * (end - start) * z + eta[prediction] * (end - t) * eps) / share
    return (window_end - z) / (end - t)


@torch.no_grad()
def sample_perflow(model, x, sigmas, extra_args=None, callback=None, disable=None, *, table, prediction="ddim_eps"):
    """Piecewise rectified flow (arXiv 2405.07510): straight steps inside four windows of the VP trajectory.

    Time t = 1 ... 0 is timestep t 1000 - 1 of ``table``. x at sigma stands for the VP sample z = x / sqrt(1 + sigma^2).
    Raises ValueError for an unknown ``prediction``.
    """
    if prediction not in PERFLOW:
        raise ValueError(f"PeRFlow prediction must be one of {', '.join(PERFLOW)}, got {prediction!r}")
    extra_args = extra_args or {}
    alphas = 1 / (1 + table.double().cpu() ** 2)
    times = [0.0 if s == 0 else (nearest_timestep(table, s) + 1) / TRAIN for s in sigmas]
    s_in = x.new_ones([x.shape[0]])
    for i in trange(len(sigmas) - 1, disable=disable):
        denoised = model(x, sigmas[i] * s_in, **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        z, eps = x / (1 + sigmas[i] ** 2).sqrt(), (x - denoised) / sigmas[i]
        z = z + (times[i + 1] - times[i]) * perflow_velocity(prediction, z, eps, times[i], alphas)
        x = z * (1 + sigmas[i + 1] ** 2).sqrt()
    return x


def omega_embedding(scale: float, dim: int = 256) -> Tensor:
    """(dim,) float32 sines then cosines of the guidance ``scale``; omega = scale - 1 is what the paper counts.

    Source: arXiv 2310.04378, section 4.2; diffusers get_guidance_scale_embedding. In float32 as there: angles reach
    13500, and models were trained with what rounding makes of them.
    """
    half = dim // 2
    step = torch.tensor(10000.0).log() / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -step)
    angles = torch.tensor(scale - 1.0) * 1000.0 * frequencies
    return torch.cat([angles.sin(), angles.cos()])


def omega_bias(scale: float, projection: Tensor, time_weight: Tensor) -> Tensor:
    """(N,) float32 to add to the first time layer's bias: time_weight @ (projection @ embedding).

    projection (C, dim) is the file's time_embedding.cond_proj, time_weight (N, C). The UNet adds the projected
    embedding to its time features before that linear layer, so both are the same. Raises ValueError when the widths
    differ.
    """
    if projection.dim() != 2 or projection.shape[0] != time_weight.shape[1] or projection.shape[1] % 2:
        raise ValueError(
            f"the guidance embedding has shape {tuple(projection.shape)} and this model's time layer takes "
            f"{time_weight.shape[1]} features: use the LCM file that this model was loaded from"
        )
    embedding = omega_embedding(scale, projection.shape[1])
    return (time_weight.double() @ (projection.double() @ embedding.double())).float()
