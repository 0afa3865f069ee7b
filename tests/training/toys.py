"""Models whose every answer is known: a Gaussian, and a mixture of points in the plane."""

import torch
from comfyui_nibble.training.paths import Path

MEAN, SPREAD = 0.7, 0.5


def vp_path() -> Path:
    """Stable Diffusion's table."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return Path.variance_preserving(torch.cumprod(1 - betas, 0))


def flow_path() -> Path:
    sigma = torch.arange(1, 1001) / 1000
    return Path(1 - sigma, sigma)


class Gaussian:
    """Data N(mean, spread^2) by element: its denoiser, its consistency function, and the student that is exact."""

    def __init__(self, path: Path, spread: float = SPREAD):
        self.path, self.spread = path, spread

    def denoise(self, z, t, cond):
        alpha, sigma = self.path.at(t, z)
        return MEAN + self.spread**2 * alpha * (z - alpha * MEAN) / self._variance(alpha, sigma)

    def _variance(self, alpha, sigma):
        return alpha**2 * self.spread**2 + sigma**2

    def end(self, z, t):
        """Where the probability-flow ODE takes z: it keeps the number of deviations from the mean."""
        alpha, sigma = self.path.at(t, z)
        return MEAN + self.spread * (z - alpha * MEAN) / self._variance(alpha, sigma).sqrt()

    def sample(self, n: int, seed: int = 0):
        return MEAN + self.spread * torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def tunable(toy: Gaussian):
    """(parameters, student): a scale and a shift by time beside the Gaussian's denoiser, none at first."""
    knobs = torch.nn.Parameter(torch.zeros(2, 1000))

    def student(z, t, cond):
        scale, shift = knobs[:, t].view(2, -1, 1, 1, 1)
        return toy.denoise(z, t, cond) * (1 + scale) + shift

    return knobs, student


class Mixture(torch.nn.Module):
    """Eight points on a circle; the exact denoiser, plus a small net that training moves away from it."""

    def __init__(self, path: Path, hidden: int = 64, seed: int = 0):
        super().__init__()
        angles = torch.arange(8) * torch.pi / 4
        self.points, self.path = 1.5 * torch.stack([angles.cos(), angles.sin()], 1), path
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(3, hidden), torch.nn.SiLU(), torch.nn.Linear(hidden, hidden), torch.nn.SiLU(),
                torch.nn.Linear(hidden, 2),
            )  # fmt: skip
        torch.nn.init.zeros_(self.net[-1].weight)
        torch.nn.init.zeros_(self.net[-1].bias)

    def teacher(self, z, t, cond=()):
        alpha, sigma = self.path.at(t, z)
        off = (z[:, None] - alpha[:, None] * self.points) / (sigma[:, None] ** 2 + alpha[:, None] ** 2 * 0.05).sqrt()
        share = (-off.square().sum(-1) / 2).softmax(1)
        gain = alpha * 0.05 / (sigma**2 + alpha**2 * 0.05)
        middle = share @ self.points
        return middle + gain * (z - alpha * middle)

    def student(self, z, t, cond=()):
        tau, size = self.path.share(t, z)
        return self.teacher(z, t) + self.net(torch.cat([z / size, tau], 1))


__all__ = ["Gaussian", "Mixture", "flow_path", "tunable", "vp_path"]
