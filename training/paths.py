"""Where a noisy latent lies between data and noise, and how a model's answer moves it: the contract of all
distillation.

    z_t = alpha_t x + sigma_t n                      t = 0 ... T-1, an index into the model's own table
    model(z, t, cond) -> x0                          t (B,) int64; cond: one entry a picture, handed on as it is
    step: z_s = alpha_s x0 + sigma_s (z_t - alpha_t x0) / sigma_t                DDIM; Euler where alpha = 1 - sigma

Variance-preserving models (epsilon and v prediction) and flow models differ in the table only. `view` makes this of the
trainer's own `Denoiser`, which speaks of sigmas and of latents that are not scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .denoise import Denoiser

Cond = Sequence  # B entries
Model = Callable[[Tensor, Tensor, Cond], Tensor]
Answer = Callable[[Tensor, Tensor], Tensor]  # (z, t) -> x0, a model with its conditions
POINTS = 1000  # of every table: flow models, whose time is continuous, are cut into as many


@dataclass(frozen=True)
class Path:
    """``alpha``, ``sigma``: (T,) float32. Raises ValueError when they are not one table of rising noise."""

    alpha: Tensor
    sigma: Tensor

    def __post_init__(self):
        if self.alpha.shape != self.sigma.shape or self.sigma.dim() != 1 or not bool((self.sigma.diff() > 0).all()):
            raise ValueError("A path is two tables of one length, the noise rising")

    @classmethod
    def variance_preserving(cls, alphas_cumprod: Tensor) -> Path:
        return cls(alphas_cumprod.float().sqrt(), (1 - alphas_cumprod.float()).sqrt())

    @classmethod
    def of_sigmas(cls, sigmas: Tensor, flow: bool) -> Path:
        """From a table of ComfyUI's sigmas: noise over data, or with ``flow`` the noise's share."""
        at = torch.linspace(0, len(sigmas) - 1, POINTS).round().long() if len(sigmas) > POINTS else slice(None)
        s = sigmas.float().cpu()[at]
        return cls(1 - s, s) if flow else cls(1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt())

    def __len__(self) -> int:
        return len(self.sigma)

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at ``t`` (B,), ready to multiply ``like`` (B, ...)."""
        shape = (-1, *[1] * (like.dim() - 1))
        return tuple(v.to(like.device)[t.to(like.device)].view(shape) for v in (self.alpha, self.sigma))

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.at(t, x)
        return alpha * x + sigma * noise

    def step(self, z: Tensor, x0: Tensor, t: Tensor, to: Tensor) -> Tensor:
        """``z`` at ``t`` moved to ``to`` along the direction that ``x0`` gives."""
        alpha, sigma = self.at(t, z)
        alpha_to, sigma_to = self.at(to, z)
        return alpha_to * x0 + sigma_to * (z - alpha * x0) / sigma

    def start(self, noise: Tensor, t: int) -> Tensor:
        """Where samplers start at ``t``: noise alone, without the little data that z_t would hold."""
        return noise * self.sigma[t].to(noise)

    def share(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(tau, size): z / size = (1 - tau) x + tau n lies on a straight line between data and noise."""
        alpha, sigma = self.at(t, like)
        return sigma / (alpha + sigma), alpha + sigma

    def snr(self, t: Tensor, like: Tensor) -> Tensor:
        alpha, sigma = self.at(t, like)
        return (alpha / sigma) ** 2


def even(points: int, steps: int) -> list[int]:
    """``steps`` descending indices, evenly spaced, from the last of ``points``: diffusers' "trailing" spacing."""
    return [round(points * (steps - i) / steps) - 1 for i in range(steps)]


def times(points: int, steps: int, grid: int) -> list[int]:
    """``steps`` descending indices of the ``grid``-point grid that ends in the last of ``points``: where diffusers' and
    ComfyUI's LCM samplers stop. Raises ValueError for more steps than the grid has.
    """
    if not 0 < steps <= grid <= points:
        raise ValueError(f"{steps} steps do not fit a grid of {grid} points out of {points}. Take at most {grid} steps")
    width = points // grid
    return [(grid - (i * grid) // steps) * width - 1 for i in range(steps)]


def guided(model: Model, cond: Cond, empty: Cond | None, cfg: float | Tensor) -> Answer:
    """``model`` under classifier-free guidance; one evaluation where ``cfg`` is 1 or there is no ``empty``."""
    plain = empty is None or (not isinstance(cfg, Tensor) and cfg == 1)

    def answer(z: Tensor, t: Tensor) -> Tensor:
        x0 = model(z, t, cond)
        if plain:
            return x0
        without = model(z, t, empty)
        return without + cfg * (x0 - without)

    return answer


@torch.no_grad()
def follow(
    answer: Answer, path: Path, noise: Tensor, stops: Sequence[int], check: Callable[[], None] = lambda: None
) -> tuple[list[Tensor], list[Tensor]]:
    """The deterministic trajectory from `start` through ``stops`` (descending) to clean data: (z at every stop, x0 at
    every stop). The last x0 is the data.
    """
    z, states, answers = path.start(noise, stops[0]), [], []
    for here, there in pairwise([*stops, None]):
        check()
        t = torch.full((len(noise),), here, device=noise.device)
        states.append(z)
        answers.append(answer(z, t))
        if there is not None:
            z = path.step(z, answers[-1], t, torch.full_like(t, there))
    return states, answers


def pick(cond: Cond, rows: Tensor) -> list:
    """The entries at ``rows`` (B,)."""
    return [cond[i] for i in rows.tolist()]


def view(denoiser: Denoiser) -> tuple[Model, Path]:
    """A `Denoiser` as a model of this file, and its path."""
    path = Path.of_sigmas(denoiser.sigmas, denoiser.flow)

    def model(z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        alpha, sigma = path.at(t, z)
        if denoiser.flow:
            return denoiser.predict(z, sigma.flatten(), cond).float()
        return denoiser.predict(z / alpha, (sigma / alpha).flatten(), cond).float()

    return model, path
