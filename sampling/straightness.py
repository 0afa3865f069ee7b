"""How straight a sampling trajectory is. Source: Rectified Flow, arXiv 2209.03003 and InstaFlow, 2309.06380.

    S(Z) = integral over t of E || (Z_1 - Z_0) - v(Z_t, t) ||^2        0: one Euler step is exact

Time runs over [t_0, t_n], 1 being noise and 0 data; the displacement and the integral are per unit of time. Values are
means over latent elements, so that picture sizes compare; times the number of elements they are the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Straightness:
    """``value``: S(Z). ``steps``: (time, squared deviation) at each recorded velocity. ``speed``: mean of v^2."""

    value: float
    steps: tuple[tuple[float, float], ...]
    speed: float

    def table(self) -> str:
        """Markdown: the value, then every step."""
        lines = [f"S(Z) = {self.value:.6g} per latent element ({self.share:.2%} of the mean squared velocity)", ""]
        lines += ["| t | squared deviation |", "|---|---|"]
        return "\n".join([*lines, *(f"| {t:.4f} | {d:.6g} |" for t, d in self.steps)])

    def bins(self, most: int = 40) -> tuple[tuple[float, float], ...]:
        """``steps``, neighbours averaged until there are at most ``most``: what fits into a chart."""
        per = -(-len(self.steps) // most)
        groups = [self.steps[i : i + per] for i in range(0, len(self.steps), per)]
        return tuple((g[0][0], sum(d for _, d in g) / len(g)) for g in groups)

    @property
    def share(self) -> float:
        """S(Z) as a share of the mean squared velocity: 0 is straight, and no trajectory has more than 1."""
        return self.value / self.speed if self.speed else 0.0


def flow_velocity(x: Tensor, denoised: Tensor, sigma: float, flow: bool) -> tuple[Tensor, float]:
    """(v, t) of rectified flow's straight-line coordinates z = (1 - t) data + t noise, from one model evaluation.

    ``flow``: x is z already and sigma is t. Otherwise x = data + sigma noise, and with t = sigma / (1 + sigma) the
    point x / (1 + sigma) lies on such a line: an Euler step in sigma and one in t end in the same place.
    """
    slope = (x - denoised) / sigma
    return (slope, sigma) if flow else (slope - denoised, sigma / (1 + sigma))


def measure(velocities: Sequence[Tensor], times: Sequence[float], displacement: Tensor | None = None) -> Straightness:
    """S(Z) of a trajectory that has velocity ``velocities[i]`` from ``times[i]`` to ``times[i + 1]``.

    velocities: n tensors of one shape (batch first), times: n + 1 descending numbers, displacement: Z at times[0] minus
    Z at times[n], where it is known better than by the sum of the steps. Raises ValueError for other counts.
    """
    if not velocities or len(times) != len(velocities) + 1:
        raise ValueError(f"{len(velocities)} velocities need {len(velocities) + 1} times, got {len(times)}")
    widths = [a - b for a, b in pairwise(times)]
    span = times[0] - times[-1]
    v = [x.double() for x in velocities]
    if displacement is None:
        displacement = torch.stack([x * w for x, w in zip(v, widths, strict=True)]).sum(0)
    mean = displacement.double() / span
    off = [float((mean - x).square().mean()) for x in v]
    value = sum(d * w for d, w in zip(off, widths, strict=True)) / span
    speed = sum(float(x.square().mean()) * w for x, w in zip(v, widths, strict=True)) / span
    return Straightness(value, tuple(zip(times[:-1], off, strict=True)), speed)
