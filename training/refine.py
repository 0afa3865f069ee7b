"""Tunes what is not 4-bit in a 4-bit model against its 16-bit teacher, without data. After EfficientDM, arXiv
2310.03270.

    loss = || output of the teacher - output of the 4-bit model ||^2 at states of the teacher's own trajectories

What is tuned, and that the codes stay on their grid: tuned.py. The teacher's states and answers are made first and
kept, so the two models are never needed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..checkpoints.save import extended, record
from ..quant.schemes import SVDQUANT
from . import paths, recipes
from .job import Base, Tell, plan_of
from .loop import Watch, train
from .paths import Cond, Model, Path, even, pick
from .tuned import Tuner

TOGETHER = 8  # prompts whose trajectories are walked side by side


@dataclass(frozen=True)
class States:
    """Where the teacher has been and what it answered: ``z`` (n, ...), ``t`` (n,), ``row`` (n,) the prompt it was asked
    with, -1 the negative one; ``home`` (n,) the prompt whose trajectory it is; ``x0`` (n, ...). On the CPU.
    """

    z: Tensor
    t: Tensor
    row: Tensor
    home: Tensor
    x0: Tensor

    def __len__(self) -> int:
        return len(self.z)


@dataclass(frozen=True)
class Walk:
    """How the teacher walks: one trajectory a prompt from its own noise, ``steps`` stops each, under ``cfg``."""

    shape: tuple[int, ...]
    steps: int = 10
    cfg: float = 3.0
    seed: int = 0


@torch.no_grad()
def states(
    teacher: Model, path: Path, prompts: tuple[Cond, object | None], walk: Walk, device: torch.device | str = "cpu",
    tell: Callable[[int, int], None] = lambda _done, _total: None,
) -> States:  # fmt: skip
    """Every stop of a trajectory of each prompt. ``prompts``: (one condition a prompt, the negative one or None); that
    one's answers are kept too where guidance asks for them. ``tell`` may raise to stop.
    """
    (cond, empty), found = prompts, []
    stops, width = even(len(path), walk.steps), len(path) // walk.steps
    rows = torch.arange(len(cond)).split(TOGETHER)
    for number, home in enumerate(rows):
        drawn = [_start(walk, int(r), width) for r in home]
        z = path.start(torch.stack([noise for noise, _ in drawn]).to(device), stops[0])
        late = torch.tensor([shift for _, shift in drawn], device=device)
        t = torch.full_like(late, stops[0])
        for i in range(len(stops)):
            tell(number * walk.steps + i, len(rows) * walk.steps)
            x0 = teacher(z, t, pick(cond, home))
            found.append((z.cpu(), t.cpu(), home, home, x0.cpu()))
            if empty is not None and walk.cfg != 1:
                without = teacher(z, t, [empty] * len(home))
                found.append((z.cpu(), t.cpu(), home * 0 - 1, home, without.cpu()))
                x0 = without + walk.cfg * (x0 - without)
            if i + 1 < len(stops):
                then = stops[i + 1] - late
                z, t = path.step(z, x0, t, then), then
    return States(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _start(walk: Walk, row: int, width: int) -> tuple[Tensor, int]:
    """(noise, how much later than evenly spaced the later stops are): prompts see noise levels of their own."""
    g = torch.Generator().manual_seed(walk.seed * 1_000_003 + row)
    return torch.randn(walk.shape, generator=g), int(torch.randint(max(1, width - 1), (), generator=g))


def output_error(
    student: Model, path: Path, prompts: tuple[Cond, object | None], some: States, device: torch.device | str = "cpu"
) -> Tensor:
    """Mean squared error of the model's output, noise or velocity, against the teacher's at the states ``some``."""
    cond, empty = prompts
    entries = [empty if r < 0 else cond[r] for r in some.row.tolist()]
    z, t = some.z.to(device), some.t.to(device)
    alpha, sigma = path.at(t, z)
    straight = torch.allclose(path.alpha + path.sigma, torch.ones(()), atol=1e-4)
    weight = (1 if straight else alpha) / sigma
    return (weight * (student(z, t, entries) - some.x0.to(device))).float().square().mean()


def objective(
    student: Model, path: Path, prompts: tuple[Cond, object | None], made: States, settings: tuple[int, object]
) -> Callable[[int, torch.Generator], Tensor]:
    """``loss(step, generator)`` over random states. ``settings``: (batch, device)."""
    batch, device = settings

    def loss(_step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(made), (batch,), generator=generator)
        return output_error(student, path, prompts, take(made, rows), device)

    return loss


def of_prompts(made: States, rows: Sequence[int]) -> States:
    """The states of some prompts' trajectories, with the answers to the negative one along them."""
    return take(made, torch.isin(made.home, torch.tensor(list(rows), dtype=torch.long)).nonzero().flatten())


def take(made: States, rows: Tensor) -> States:
    return States(made.z[rows], made.t[rows], made.row[rows], made.home[rows], made.x0[rows])


@torch.no_grad()
def measure(
    student: Model, path: Path, prompts: tuple[Cond, object | None], held: States, device: torch.device | str = "cpu"
) -> float:
    """`output_error` over all of ``held``, a few states at a time."""
    parts = torch.arange(len(held)).split(8)
    errors = [output_error(student, path, prompts, take(held, p), device) * len(p) for p in parts]
    return float(sum(errors) / len(held))


def split(prompts: Sequence) -> tuple[list[int], list[int]]:
    """(prompts to learn on, prompts held out): every fourth is held out, none of fewer than four."""
    held = list(range(3, len(prompts), 4))
    return [i for i in range(len(prompts)) if i not in held], held


@dataclass(frozen=True)
class Refined:
    """``weights``: by native layer, plain. ``before``, ``after``: error of the output on prompts held out, or on those
    trained on where there are fewer than four.
    """

    weights: dict
    before: float
    after: float
    losses: tuple[float, ...]
    text: str

    def about(self, old: Mapping[str, str], row: recipes.Refine) -> dict[str, str]:
        """``old``, what the model said of itself, with what was done to it."""
        old = record(scheme=SVDQUANT.id) | dict(old)
        return extended(old, refined={**asdict(row), "output_error": [self.before, self.after]})


def ask(
    teacher: Base, prompts: tuple[Cond, object | None], shape: tuple[int, ...], row: recipes.Refine, tell: Tell
) -> States:
    """Where ``teacher`` goes on each prompt. It is not needed afterwards."""
    model, path = paths.view(teacher.denoiser)
    walk = Walk(shape, row.stops, row.cfg, row.seed)
    return states(model, path, prompts, walk, teacher.device, lambda d, n: tell("states of the teacher", d, n))


def run(base: Base, prompts: tuple[Cond, object | None], made: States, row: recipes.Refine, watch: Watch) -> Refined:
    """The 4-bit ``base`` tuned towards what its teacher answered at ``made``; its module stays as it is."""
    (model, path), device = paths.view(base.denoiser), base.device
    learn, held = (of_prompts(made, rows) for rows in split(prompts[0]))
    tuner, check = Tuner(base.module), held if len(held) else learn
    with tuner.attached(watch.check):
        before = measure(model, path, prompts, check, device)
        loss = objective(model, path, prompts, learn, (row.batch, device))
        result = train(plan_of("refine", row, base.dtype), tuner.parameters(), loss, None, watch)
        after = measure(model, path, prompts, check, device)
    where = "prompts held out" if len(held) else "the prompts trained on (fewer than four)"
    text = "\n".join([
        f"| layers tuned | {len(tuner.layers)}: scales, zeros and low-rank factors; codes as they were |",
        "|---|---|",
        f"| output error, {where} | {before:.6f} -> {after:.6f} ({after / before - 1:+.1%}) |",
        f"| updates | {len(result.losses)} in {result.seconds:.0f} s |",
    ])  # fmt: skip
    return Refined({base.names(n): w for n, w in tuner.weights().items()}, before, after, result.losses, text)
