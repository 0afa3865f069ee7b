"""Grids, TCD and the guidance embedding against diffusers; PeRFlow against its authors' equations written out in VP."""

import math

import numpy as np
import pytest
import torch
from comfyui_nibble.sampling.samplers import (
    omega_bias,
    omega_embedding,
    perflow_velocity,
    sample_perflow,
    sample_tcd,
    seeded_noise,
    window_of,
)
from comfyui_nibble.sampling.schedules import consistency_grid, trailing, windows

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of these tests")
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SHAPE = (2, 4, 8, 8)


class Network(torch.nn.Module):
    """A small fixed epsilon network of (VP sample, timestep)."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.a = torch.randn(16, 4, 3, 3, generator=g) / 6
        self.b = torch.randn(4, 16, 3, 3, generator=g) / 12
        self.seen = []

    def forward(self, z: torch.Tensor, t: float) -> torch.Tensor:
        self.seen.append(float(t))
        h = torch.nn.functional.conv2d(z, self.a, padding=1)
        h = torch.tanh(h + math.sin(t / 300))
        return 0.7 * z + torch.nn.functional.conv2d(h, self.b, padding=1)


def table() -> torch.Tensor:
    """(1000,) sigmas of Stable Diffusion's schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = torch.cumprod(1 - betas, 0)
    return ((1 - a) / a).sqrt().float()


def denoiser(network, levels: torch.Tensor, offset: int = 0):
    """k-diffusion's view of ``network``: model(x, sigma) -> denoised; it is told timestep + ``offset``."""

    def model(x, sigma, **_):
        t = int((levels.log() - sigma[0].log()).abs().argmin())
        s = sigma.view(-1, 1, 1, 1)
        return x - s * network(x / (1 + s**2).sqrt(), t + offset)

    return model


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("strength", [1.0, 0.7, 0.5, 0.33])
def test_consistency_grid(n, strength):
    for kind in (diffusers.LCMScheduler, diffusers.TCDScheduler):
        scheduler = kind(**BETAS)
        scheduler.set_timesteps(n, strength=strength)
        assert tuple(scheduler.timesteps.tolist()) == consistency_grid(n, strength)


@pytest.mark.parametrize("n", [*range(1, 21), 25, 30, 50])
def test_trailing_grid(n):
    scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    assert tuple(scheduler.timesteps.tolist()) == trailing(n)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_tcd(n, eta):
    network, levels = Network(), table()
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    scheduler = diffusers.TCDScheduler(**BETAS)
    scheduler.set_timesteps(n)
    z, g = start.clone(), torch.Generator().manual_seed(12)
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, int(t)), t, z, eta=eta, generator=g).prev_sample
    sigmas = torch.tensor([*(levels[t] for t in consistency_grid(n)), 0.0])
    x = start * (1 + sigmas[0] ** 2).sqrt()
    ours = sample_tcd(denoiser(network, levels), x, sigmas, {"seed": 11}, disable=True, table=levels, eta=eta)
    assert (ours - z).abs().max() <= 1e-4


def test_tcd_without_eta_draws_no_noise():
    levels = table()
    sigmas = torch.tensor([levels[999], levels[499], 0.0])

    def noise(*_):
        raise AssertionError("eta 0 is deterministic")

    model = denoiser(Network(), levels)
    out = sample_tcd(model, torch.randn(SHAPE), sigmas, disable=True, table=levels, eta=0.0, noise_sampler=noise)
    assert torch.isfinite(out).all()


def authors_perflow(network, kind: str, n: int, start: torch.Tensor) -> torch.Tensor:
    """The PeRFlow scheduler's loop, from its equations: windows in t = timestep / 1000, alphas at 1000 t - 1."""
    a = (1 / (1 + table().double() ** 2)).numpy()
    starts, ends = [1.0, 0.75, 0.5, 0.25], [0.75, 0.5, 0.25, 0.0]
    counts = [n // 4 + (i < n % 4) for i in range(4)]
    parts = [np.linspace(s, e, c, endpoint=False) for s, e, c in zip(starts, ends, counts, strict=True)]
    steps = (np.concatenate(parts) * 1000).astype(np.int64)
    z = start.double()
    for i, t in enumerate(steps):
        t_c = t / 1000
        w = next(i for i in range(4) if t_c > ends[i] + 1e-4)
        t_s, t_e = starts[w], ends[w]
        a_s, a_e = a[int(t_s * 1000 - 1)], a[max(int(t_e * 1000 - 1), 0)]
        eps = network(z.float(), int(t)).double()
        if kind == "velocity":
            v = eps
        else:
            if kind == "ddim_eps":
                lam_s = (a_e / a_s) ** 0.5
                eta_s = (1 - a_e) ** 0.5 - (a_e / a_s * (1 - a_s)) ** 0.5
            else:
                gamma = (a_s / a_e) ** 0.5
                lam_s, eta_s = 1 / gamma, -((1 - gamma**2) ** 0.5) / gamma
            below = lam_s * (t_c - t_s) + (t_e - t_c)
            end = lam_s * (t_e - t_s) / below * z + eta_s * (t_e - t_c) / below * eps
            v = (end - z) / (t_e - t_c)
        after = steps[i + 1] if i + 1 < n else 0
        z = z + (after - t) / 1000 * v
    return z


@pytest.mark.parametrize("kind", ["ddim_eps", "diff_eps", "velocity"])
@pytest.mark.parametrize("n", [4, 5, 6, 8, 16])
def test_perflow(kind, n):
    network, levels = Network(), table()
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    expected = authors_perflow(network, kind, n, start)
    seen = list(network.seen)
    network.seen.clear()
    sigmas = torch.tensor([*(levels[t - 1] for t in windows(n)), 0.0])
    model = denoiser(network, levels, offset=1)
    x = start * (1 + sigmas[0] ** 2).sqrt()
    ours = sample_perflow(model, x, sigmas, disable=True, table=levels, prediction=kind)
    assert network.seen == seen == list(windows(n))
    assert (ours - expected).abs().max() <= 1e-4


def test_perflow_windows_own_their_start():
    assert [window_of(t) for t in (1.0, 0.751, 0.75, 0.25, 0.001)] == [
        (1.0, 0.75), (1.0, 0.75), (0.75, 0.5), (0.25, 0.0), (0.25, 0.0)
    ]  # fmt: skip


def test_perflow_refuses_another_prediction():
    with pytest.raises(ValueError, match="must be one of diff_eps, ddim_eps, velocity, got 'epsilon'"):
        sample_perflow(None, torch.zeros(1), torch.tensor([1.0, 0.0]), table=table(), prediction="epsilon")


def test_perflow_is_exact_for_the_true_noise():
    """With the true epsilon of one window's DDIM line, one step lands on the window's end."""
    a = 1 / (1 + table().double() ** 2)
    data, noise = torch.randn(SHAPE).double(), torch.randn(SHAPE).double()
    at = {t: (a[t - 1] ** 0.5 * data + (1 - a[t - 1]) ** 0.5 * noise) for t in (1000, 750)}
    v = perflow_velocity("ddim_eps", at[1000], noise, 1.0, a)
    torch.testing.assert_close(at[1000] - 0.25 * v, at[750])


def test_noise_is_never_the_first_noise_again():
    x = torch.zeros(SHAPE)
    first = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    again = seeded_noise(x, 5)
    assert not torch.equal(first, again(None, None))
    assert torch.equal(seeded_noise(x, 4)(None, None), first)


@pytest.mark.parametrize("scale", [1.0, 2.0, 8.0, 14.5])
def test_guidance_embedding(scale):
    pipe = diffusers.LatentConsistencyModelPipeline
    theirs = pipe.get_guidance_scale_embedding(None, torch.tensor([scale - 1.0]), embedding_dim=256)[0]
    assert (omega_embedding(scale) - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("scale", [1.0, 2.0, 8.0])
def test_guidance_is_a_bias(scale):
    """diffusers' TimestepEmbedding with a condition equals the one without, its bias moved."""
    from diffusers.models.embeddings import TimestepEmbedding

    time = TimestepEmbedding(32, 64, cond_proj_dim=256)
    features = torch.randn(3, 32)
    condition = omega_embedding(scale).expand(3, -1)
    expected = time(features, condition)
    with torch.no_grad():
        time.linear_1.bias += omega_bias(scale, time.cond_proj.weight, time.linear_1.weight)
    assert (time(features) - expected).abs().max() <= 5e-6


def test_guidance_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"shape \(320, 256\) and this model's time layer takes 128 features"):
        omega_bias(8.0, torch.zeros(320, 256), torch.zeros(512, 128))
