"""How far a distilled student is from what it learns: few-step pictures against the teacher's, or lcf's own loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import consistency, paths, reflow

if TYPE_CHECKING:
    from .distill import Settings, Task

# lcf: what a 4-bit base rounds its activations to is most of the change between neighbouring times, and a tenth of it
# over a longer step; no solver is at work that a longer step would make worse. A distance that is square for small
# changes is smaller for one that comes gradually than for one at once: a sum of absolute changes is the same for both.
FINE_SKIP, FINE_HUBER = 100, 0.1


def fine(s: Settings) -> consistency.Consistency:
    """lcf's own settings."""
    return replace(s.consistency, skip=max(s.consistency.skip, FINE_SKIP), huber=FINE_HUBER)


def batch_of(task: Task, pairs: reflow.Pairs, index: Tensor) -> reflow.Batch:
    x = (t[index].to(task.device) for t in (pairs.noise, pairs.x1))
    return reflow.Batch(*x, paths.pick(task.cond, pairs.row[index]))


@torch.no_grad()
def by_lcm(task: Task, s: Settings, held: reflow.Pairs | None) -> float:
    """Distance of LCM pictures to the teacher's; for lcf, which has none, its loss on the pictures, noise fixed."""
    g = torch.Generator().manual_seed(s.plan.seed)
    if held is None:
        return _fine_loss(task, s, g)
    batch = batch_of(task, held, torch.arange(len(held)))
    stops = paths.times(len(task.path), s.steps, len(task.path) // s.consistency.skip)
    x = consistency.sample(task.student, task.path, batch.noise, batch.cond, stops, g)
    return float((x - batch.x1).square().mean())


def _fine_loss(task: Task, s: Settings, g: torch.Generator) -> float:
    """lcf's loss on up to eight pictures, at every time of its grid with fixed noise."""
    student, settings, losses = consistency.Student(task.student, task.student), fine(s), []
    index = torch.arange(min(8, len(task.pictures)))
    batch = consistency.Batch(task.pictures[index].to(task.device), paths.pick(task.cond, index % len(task.cond)))
    for i in range(len(task.path) // settings.skip):
        drawn = consistency.draw(batch.x, task.path, settings, g)
        at = replace(drawn, t=torch.full_like(drawn.t, (i + 1) * settings.skip - 1))
        losses.append(consistency.lcf(student, batch, at, task.path, settings))
    return float(sum(losses) / len(losses))


def by_euler(count: Callable[[Settings], int]) -> Callable:
    @torch.no_grad()
    def measure(task: Task, s: Settings, held: reflow.Pairs) -> float:
        """Distance of the student's Euler pictures to the teacher's, from the same noise."""
        batch = batch_of(task, held, torch.arange(len(held)))
        answer = paths.guided(task.student, batch.cond, None, 1.0)
        _, answers = paths.follow(answer, task.path, batch.noise, paths.even(len(task.path), count(s)))
        return float((answers[-1] - batch.x1).square().mean())

    return measure
