"""Progressive distillation: two DDIM steps of the teacher become one of the student. Source: arXiv 2202.00512, alg. 2.

    x~ = (z_t'' - (sigma''/sigma) z_t) / (alpha'' - (sigma''/sigma) alpha)         z_t'' after two steps from z_t
    loss = max(SNR(t), 1) || x~ - x0_student(z_t, t) ||^2

N steps are halved again and again; the student of one round is the teacher of the next. Guidance is in the first
teacher only, so the student needs none (cfg 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .paths import Answer, Path, even


def target(answer: Answer, path: Path, z: Tensor, at: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    """x~: what a single step from ``z`` must answer to land where the teacher's two steps land.

    at: (t, t', t'') index tensors (B,); t'' None is clean data.
    """
    t, middle, end = at
    first = path.step(z, answer(z, t), t, middle)
    x0 = answer(first, middle)
    if end is None:
        return x0  # alpha'' = 1, sigma'' = 0
    alpha, sigma = path.at(t, z)
    alpha_end, sigma_end = path.at(end, z)
    ratio = sigma_end / sigma
    return (path.step(first, x0, middle, end) - ratio * z) / (alpha_end - ratio * alpha)


def loss(student: Answer, teacher: Answer, path: Path, z: Tensor, at: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    """The distillation loss of one interval; ``teacher`` is asked without gradients."""
    with torch.no_grad():
        wanted = target(teacher, path, z, at)
    weight = path.snr(at[0], z).clamp(min=1)
    return (weight * (student(z, at[0]) - wanted).float().square()).mean()


def rounds(start: int, steps: int) -> list[int]:
    """The student's number of steps in each round: from ``start`` halved down to ``steps``. Raises ValueError unless
    halving gets there.
    """
    out = []
    now = start
    while now > steps and now % 2 == 0:
        now //= 2
        out.append(now)
    if now != steps or not out:
        raise ValueError(f"{start} steps cannot be halved to {steps}; take a power of two times {steps}")
    return out


def interval(path: Path, steps: int, generator: torch.Generator, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """One of the student's ``steps`` intervals as (t, t', t''), the same for all ``n`` rows of a batch."""
    stops = [*even(len(path), 2 * steps), None]
    i = 2 * int(torch.randint(steps, (), generator=generator))
    t, middle, end = (None if s is None else torch.full((n,), s) for s in stops[i : i + 3])
    return t, middle, end


@contextmanager
def using(params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside it ``params`` hold ``values``: the student of the last round, asked as a teacher."""
    kept = [p.data for p in params]
    try:
        for p, v in zip(params, values, strict=True):
            p.data = v.detach()
        yield
    finally:
        for p, v in zip(params, kept, strict=True):
            p.data = v


def held(model: Callable, params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Callable:
    """``model`` as it was with ``values`` in its ``params``; only for use without gradients."""

    def answer(*args) -> Tensor:
        with using(params, values):
            return model(*args)

    return answer
