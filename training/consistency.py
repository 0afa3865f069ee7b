"""Latent consistency: distillation (LCD) and fine-tuning (LCF). Source: Latent Consistency Models, arXiv 2310.04378.

    f(z, t) = c_skip(t) z + c_out(t) x0(z, t)      c_skip = s^2 / ((10 t)^2 + s^2), c_out = 10 t / sqrt((10 t)^2 + s^2)
    LCD     d( f(z_t, t),  f-(z_t', t') )          z_t' = one guided DDIM step of the teacher from z_t, t' = t - skip
    LCF     d( f(z_t, t),  f-(z_t', t') )          z_t, z_t' = one picture with one noise at t and at t'; no teacher
    d       pseudo-Huber; f- is the moving average of the student, held fixed

Times are the grid skip - 1, 2 skip - 1 ... 999: with a skip of 20, 1 to 8 steps of ComfyUI's and diffusers' LCM
samplers land on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .paths import Cond, Model, Path, guided

SIGMA_DATA, SCALING = 0.5, 10.0


@dataclass(frozen=True)
class Consistency:
    """``omega``: guidance scale minus 1, drawn per picture between the two. ``huber``: where the distance turns from
    square to straight. Raises ValueError for values outside their range.
    """

    skip: int = 20
    omega: tuple[float, float] = (2.0, 14.0)
    huber: float = 1e-3

    def __post_init__(self):
        if self.skip < 1 or self.huber <= 0 or self.omega[0] > self.omega[1] or self.omega[0] < 0:
            raise ValueError("Consistency needs a step of 1 or more, a positive huber and a rising range of omega")


@dataclass(frozen=True)
class Student:
    """``model`` is trained; ``held`` is f-: its moving average, or the model itself."""

    model: Model
    held: Model


@dataclass(frozen=True)
class Batch:
    """Pictures ``x`` (B, ...) and what they are drawn from, B entries; ``empty``: the negative side, None for none."""

    x: Tensor
    cond: Cond
    empty: Cond | None = None


@dataclass(frozen=True)
class Draw:
    """What is random in one step: ``t`` (B,) on the grid, ``noise`` like x, ``omega`` (B,)."""

    t: Tensor
    noise: Tensor
    omega: Tensor


def boundary(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out), ready to multiply ``like`` (B, ...), for integer times ``t`` (B,)."""
    s = (SCALING * t.float().to(like.device)).view(-1, *[1] * (like.dim() - 1))
    total = s**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, s / total.sqrt()


def function(model: Model, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """f(z, t) of ``model``."""
    skip, out = boundary(t, z)
    return skip * z + out * model(z, t, cond)


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """Mean of sqrt(d^2 + c^2) - c, in float32."""
    return ((difference.float() ** 2 + c**2).sqrt() - c).mean()


def draw(like: Tensor, path: Path, settings: Consistency, generator: torch.Generator) -> Draw:
    """Everything random in a step, from ``generator`` (CPU) alone."""
    n, device = len(like), like.device
    grid = len(path) // settings.skip
    t = (torch.randint(grid, (n,), generator=generator) + 1) * settings.skip - 1
    low, high = settings.omega
    omega = low + (high - low) * torch.rand(n, generator=generator)
    noise = torch.randn(like.shape, generator=generator)
    return Draw(t.to(device), noise.to(device), omega.to(device))


def lcd(student: Student, teacher: Model, batch: Batch, drawn: Draw, path: Path, settings: Consistency) -> Tensor:
    """The distillation loss. ``teacher`` and f- are only asked without gradients."""
    t, earlier = drawn.t, (drawn.t - settings.skip).clamp(min=0)
    z = path.noised(batch.x, drawn.noise, t)
    with torch.no_grad():
        scale = (1 + drawn.omega).view(-1, *[1] * (z.dim() - 1))
        x0 = guided(teacher, batch.cond, batch.empty, scale)(z, t)
        target = function(student.held, path.step(z, x0, t, earlier), earlier, batch.cond)
    return pseudo_huber(function(student.model, z, t, batch.cond) - target, settings.huber)


def lcf(student: Student, batch: Batch, drawn: Draw, path: Path, settings: Consistency) -> Tensor:
    """The fine-tuning loss: the picture itself says where the step before lies."""
    t, earlier = drawn.t, (drawn.t - settings.skip).clamp(min=0)
    with torch.no_grad():
        target = function(student.held, path.noised(batch.x, drawn.noise, earlier), earlier, batch.cond)
    z = path.noised(batch.x, drawn.noise, t)
    return pseudo_huber(function(student.model, z, t, batch.cond) - target, settings.huber)


@torch.no_grad()
def sample(
    model: Model, path: Path, noise: Tensor, cond: Cond, stops: Sequence[int], generator: torch.Generator
) -> Tensor:
    """LCM multistep sampling (alg. 3): f at each of ``stops`` (`paths.times`), fresh noise between. Used to measure."""
    z = path.start(noise, stops[0])
    for i, stop in enumerate(stops):
        t = torch.full((len(noise),), stop, device=noise.device)
        x0 = function(model, z, t, cond)
        if i + 1 == len(stops):
            break
        fresh = torch.randn(noise.shape, generator=generator).to(noise)
        z = path.noised(x0, fresh, torch.full_like(t, stops[i + 1]))
    return x0


Source = Callable[[int, torch.Generator], Batch]


def objective(
    distance: Callable[[Batch, Draw], Tensor], source: Source, path: Path, settings: Consistency
) -> Callable[[int, torch.Generator], Tensor]:
    """``distance`` as the loop calls it, at random times with random noise; ``source(step, generator)`` gives the
    pictures.
    """

    def loss(step: int, generator: torch.Generator) -> Tensor:
        batch = source(step, generator)
        return distance(batch, draw(batch.x, path, settings, generator))

    return loss
