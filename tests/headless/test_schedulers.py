"""Presets on diffusers' schedulers: each visits what its row lists, whatever a pipeline asks for, and does its
sampler's arithmetic.
"""

from itertools import pairwise

import pytest
import torch
from comfyui_nibble.families import PRESETS
from comfyui_nibble.headless import schedulers
from comfyui_nibble.sampling.presets import preset
from comfyui_nibble.sampling.samplers import sample_perflow, sample_tcd
from comfyui_nibble.sampling.schedules import visits

OWN = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
           prediction_type="epsilon", timestep_spacing="leading", steps_offset=1, clip_sample=False)  # fmt: skip
SHAPE = (2, 4, 6, 6)


def table() -> torch.Tensor:
    a = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    return ((1 - a) / a).sqrt()


def network(z: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(z.roll(1, -1) + t / 700) - 0.3 * z


def run(scheduler, seed: int = 3, steps: int = 7) -> tuple[torch.Tensor, list[float]]:
    """(the sample, the timesteps that the network was told) of a pipeline's loop that asks for ``steps``."""
    g = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps, device="cpu")
    z = torch.randn(SHAPE, generator=g) * getattr(scheduler, "init_noise_sigma", 1.0)
    seen = []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
        seen.append(float(t))
        z = scheduler.step(network(scaled, float(t)), t, z, generator=g, return_dict=False)[0]
    return z, seen


def first(seed: int = 3):
    """(noise, the generator after it)"""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=g), g


@pytest.mark.parametrize("id", PRESETS)
def test_every_row_visits_what_it_lists(id):
    row = preset(id)
    out, seen = run(schedulers.scheduler(row, visits(row), OWN))
    told = [1000 * v for v in row.shown] if row.has_sigmas else list(row.shown)
    assert seen == pytest.approx(told, abs=0.06)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("asked", [dict(timesteps=[1, 0]), dict(sigmas=[1.0, 0.5], mu=1.15), dict(mu=0.5)])
def test_a_pipeline_cannot_ask_for_others(asked):
    for id in ("lightning_sdxl", "lcm_lora_sd15", "tcd_sd15", "flux_schnell", "instaflow"):
        row = preset(id)
        made = schedulers.scheduler(row, visits(row), OWN)
        made.set_timesteps(None, device="cpu", **asked)
        scale = 1000 if row.has_sigmas else 1
        assert made.timesteps.tolist() == pytest.approx([scale * v for v in row.shown], abs=0.06)


@pytest.mark.parametrize("id", ["distilled_sd15", "lightning_sdxl_1step", "hyper_sdxl_1step_unet"])
def test_euler_from_noise_of_unit_variance(id):
    row, sigma = preset(id), table()
    steps = list(row.shown)
    x = first()[0] * (1 + sigma[steps[0]] ** 2).sqrt()
    for i, t in enumerate(steps):
        s, to = sigma[t], sigma[steps[i + 1]] if i + 1 < len(steps) else 0.0
        out = network(x / (1 + s**2).sqrt(), t)
        x0 = out if row.prediction == "x0" else x - s * out
        x = x0 + (x - x0) * to / s
    assert (run(schedulers.scheduler(row, visits(row), OWN))[0] - x).abs().max() <= 1e-3


@pytest.mark.parametrize("id", ["lcm_lora_sd15", "dmd2_sdxl", "dmd2_sdxl_1step"])
def test_lcm(id):
    row, a = preset(id), 1 / (1 + table() ** 2)
    z, g = first()
    for i, t in enumerate(row.shown):
        x0 = (z - (1 - a[t]).sqrt() * network(z, t)) / a[t].sqrt()
        z = x0
        if i + 1 < len(row.shown):
            to = row.shown[i + 1]
            z = a[to].sqrt() * x0 + (1 - a[to]).sqrt() * torch.randn(SHAPE, generator=g)
    # The boundary condition moves x0 by less than a ten-thousandth
    assert (run(schedulers.scheduler(row, visits(row), OWN))[0] - z).abs().max() <= 2e-3


def test_euler_ancestral():
    row, sigma = preset("sd_turbo_trailing"), table()
    noise, g = first()
    x, steps = noise * (1 + sigma[999] ** 2).sqrt(), list(row.shown)
    for i, t in enumerate(steps):
        s, to = sigma[t], sigma[steps[i + 1]] if i + 1 < len(steps) else torch.tensor(0.0)
        x0 = x - s * network(x / (1 + s**2).sqrt(), t)
        up = (to**2 * (s**2 - to**2) / s**2).sqrt()
        down = (to**2 - up**2).sqrt()
        x = x0 + (x - x0) * down / s + up * torch.randn(SHAPE, generator=g)
    assert (run(schedulers.scheduler(row, visits(row), OWN))[0] - x).abs().max() <= 1e-3


def view(levels: torch.Tensor, offset: int = 0):
    """k-diffusion's view of the network."""

    def model(x, sigma, **_):
        t = int((levels.log() - sigma[0].log()).abs().argmin())
        s = sigma.view(-1, 1, 1, 1)
        return x - s * network(x / (1 + s**2).sqrt(), t + offset)

    return model


@pytest.mark.parametrize("id", ["tcd_sd15", "hyper_sd15_1step"])
def test_tcd_with_the_rows_eta(id):
    row, levels = preset(id), table()
    noise, g = first()
    sigmas = torch.tensor([*(levels[t] for t in visits(row, 4)), 0.0])
    fresh = lambda *_: torch.randn(SHAPE, generator=g)  # noqa: E731
    x = noise * (1 + sigmas[0] ** 2).sqrt()
    want = sample_tcd(view(levels), x, sigmas, disable=True, table=levels, eta=row.eta, noise_sampler=fresh)
    assert (run(schedulers.scheduler(row, visits(row, 4), OWN))[0] - want).abs().max() <= 1e-3


@pytest.mark.parametrize("id", ["perflow_sd15", "perflow_sd21", "perflow_sdxl"])
@pytest.mark.parametrize("steps", [4, 5, 8])
def test_perflow(id, steps):
    row, levels = preset(id), table()
    sigmas = torch.tensor([*(levels[t - 1] for t in visits(row, steps)), 0.0])
    x = first()[0] * (1 + sigmas[0] ** 2).sqrt()
    want = sample_perflow(view(levels, 1), x, sigmas, disable=True, table=levels, prediction=row.prediction)
    assert (run(schedulers.scheduler(row, visits(row, steps), OWN))[0] - want).abs().max() <= 1e-3


@pytest.mark.parametrize(("id", "steps"), [("instaflow", 1), ("rectified_flow_2", 5), ("flux_schnell", 3)])
def test_flows_and_their_signs(id, steps):
    row = preset(id)
    z, sigmas = first()[0], [*visits(row, steps), 0.0]
    sign = 1 if row.prediction == "rectified_flow" else -1  # data - noise, or noise - data
    for s, to in pairwise(sigmas):
        z = z + sign * (s - to) * network(z, 1000 * s)
    assert (run(schedulers.scheduler(row, visits(row, steps), OWN))[0] - z).abs().max() <= 1e-4


@pytest.mark.parametrize("id", ["distilled_sd15", "lcm_lora_sd15", "perflow_sd15"])
def test_a_picture_is_given_the_noise_of_the_first_timestep(id):
    row, a = preset(id), 1 / (1 + table() ** 2)
    made = schedulers.scheduler(row, visits(row, 4, 0.5), OWN)
    made.set_timesteps(99)
    if hasattr(made, "set_begin_index"):
        made.set_begin_index(0)
    x, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    got = made.add_noise(x, noise, made.timesteps[:1].repeat(2))
    at = int(made.timesteps[0]) - (row.sampler == "perflow")
    want = x + noise * table()[at] if row.sampler == "euler" else a[at].sqrt() * x + (1 - a[at]).sqrt() * noise
    assert (got - want).abs().max() <= 1e-4


def test_what_the_model_was_trained_with_is_kept():
    other = OWN | {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "v_prediction"}
    for id in ("lightning_sdxl", "lcm_lora_sdxl", "sdxl_turbo", "tcd_sdxl"):
        made = schedulers.scheduler(preset(id), visits(preset(id)), other)
        assert made.config.prediction_type == "v_prediction"
        assert float(made.betas[0]) == pytest.approx(1e-4)


def test_another_number_of_levels_is_refused():
    with pytest.raises(ValueError, match="tcd_sd15 counts 1000 noise levels, and this pipeline's scheduler has 100"):
        schedulers.scheduler(preset("tcd_sd15"), (999,), OWN | {"num_train_timesteps": 100})
