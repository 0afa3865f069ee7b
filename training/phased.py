"""Latent consistency in phases: as many steps as the model is sampled with, each of which ends where the teacher's
trajectory goes through. Source: Phased Consistency Models, arXiv 2405.18407 (no adversarial loss, squared distance).

    edges    N even points of the table, the last of them clean data; e(t) the next edge below t
    F(z, t)  z at t moved to e(t) along x0(z, t)                                  one DDIM or Euler step of the sampler
    loss     || F(z_t, t) - F-(z_t', t') ||^2     z_t' = one guided DDIM step of the teacher from z_t, t' = max(t -
    skip,
                                                  e(t)); where t' is the edge, F- hands z_t' through

With one phase and the squared distance this is latent consistency distillation (consistency.py), whose every answer is
the picture: between two of its steps a sampler must add noise again, so it leaves the teacher's trajectory. Here each
step only aims at the next edge, and N deterministic steps from the teacher's noise end at the teacher's picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .consistency import Batch, Consistency, Draw, Student
from .paths import Cond, Model, Path, even, guided

CLEAN = -1  # an edge that lies below the table


@dataclass(frozen=True)
class Phases(Consistency):
    """``count``: how many, which is the number of steps that the result is sampled with."""

    count: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.count < 1:
            raise ValueError("Phased consistency needs at least one phase")


def edge(path: Path, t: Tensor, count: int) -> Tensor:
    """(B,) the edge below each ``t``; `CLEAN` in the last phase."""
    edges = torch.tensor([CLEAN, *reversed(even(len(path), count)[1:])], device=t.device)
    return edges[(t[:, None] > edges).sum(1) - 1]


def move(path: Path, z: Tensor, x0: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """`Path.step`, also to clean data."""
    clean = (to == CLEAN).view(-1, *[1] * (z.dim() - 1))
    return torch.where(clean, x0, path.step(z, x0, t, to.clamp(min=0)))


def function(model: Model, path: Path, at: tuple[Tensor, Tensor, Tensor], cond: Cond) -> Tensor:
    """F: (z, t, e) = ``at`` moved to e along the model's answer; z itself where t is e."""
    z, t, e = at
    moved = move(path, z, model(z, t.clamp(min=0), cond), t.clamp(min=0), e)
    return torch.where((t == e).view(-1, *[1] * (z.dim() - 1)), z, moved)


def distance(
    student: Student, teacher: Model, batch: Batch, drawn: Draw, path: Path, settings: Phases
) -> Tensor:  # fmt: skip
    """The loss. ``teacher`` and F- are only asked without gradients."""
    t, e = drawn.t, edge(path, drawn.t, settings.count)
    z, earlier = path.noised(batch.x, drawn.noise, t), torch.maximum(t - settings.skip, e)
    with torch.no_grad():
        scale = (1 + drawn.omega).view(-1, *[1] * (z.dim() - 1))
        x0 = guided(teacher, batch.cond, batch.empty, scale)(z, t)
        target = function(student.held, path, (move(path, z, x0, t, earlier), earlier, e), batch.cond)
    return (function(student.model, path, (z, t, e), batch.cond) - target).float().square().mean()
