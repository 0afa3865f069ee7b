"""The six ways of making a model need fewer steps, by one table: what each trains on, and what it minimises.

id            trains on                                        then sampled
lcm           pictures, or the teacher's own; guided teacher   LCM, 1-8 steps, cfg 1
lcf           pictures; no teacher                             LCM, 1-8 steps, cfg 1
phased        pictures, or the teacher's own; guided teacher   Euler or DDIM, ``steps`` steps, cfg 1
reflow        the teacher's noise-picture pairs                Euler, few steps, cfg 1
one_step      the same pairs                                   Euler, 1 step, cfg 1
progressive   pictures, or the teacher's own; halved steps     Euler or DDIM, ``steps`` steps, cfg 1
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path as File

import torch
from torch import Tensor, nn

from ..checkpoints.save import record, signature
from ..sampling import distilled
from . import consistency, paths, phased, progressive, recipes, reflow
from .adapters import Adapters
from .job import STATES, Base, Made, Place, Tell, adapters_of, file_bytes, finished, plan_of
from .loop import Plan, Result, Watch, train
from .paths import Cond, Model, Path

TARGET = 0.9  # decay of the average that is f- in lcm, lcf and phased
EXTRA = 4  # pairs kept out of training, to measure on
# lcf: what a 4-bit base rounds its activations to is most of the change between neighbouring times, and a tenth of it
# over a longer step; no solver is at work that a longer step would make worse. A distance that is square for small
# changes is smaller for one that comes gradually than for one at once: a sum of absolute changes is the same for both.
FINE_SKIP, FINE_HUBER = 100, 0.1


@dataclass(frozen=True)
class Task:
    """What is trained, on what. ``student``: the base with its LoRA, whose ``params`` are trained; ``teacher`` without
    it, or another model. ``cond``: one entry a prompt; ``empty``: the negative one, or None. ``pictures`` (n, ...):
    latents as the model has them; picture i belongs to prompt i modulo their number. ``shape``: of one latent.
    """

    student: Model
    teacher: Model
    params: Sequence[nn.Parameter]
    path: Path
    cond: Cond
    empty: object | None
    shape: tuple[int, ...]
    pictures: Tensor | None = None
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class Settings:
    """``row`` with its plan. ``about``: see `reflow.Making`."""

    row: recipes.Distill
    plan: Plan
    about: str = ""
    consistency: consistency.Consistency = field(default_factory=consistency.Consistency)

    def __post_init__(self):
        if self.row.way not in MODES:
            raise ValueError(f"unknown way to distil {self.row.way!r}; there are {', '.join(MODES)}")
        if self.row.way == "progressive":
            progressive.rounds(self.row.start, self.row.steps)


@dataclass(frozen=True)
class Outcome:
    """``before``, ``after``: mean squared distance of few-step pictures to the teacher's, on pairs that were kept out
    of training (lcf: to one's own pictures, as their loss). ``losses``: one a step, of all rounds. ``notes``,
    ``kept``: see `loop.Result`.
    """

    before: float
    after: float
    losses: tuple[float, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    kept: bool = False


def train_task(
    task: Task, settings: Settings, work: File | None, watch: Watch, tell: Tell = lambda *_: None
) -> Outcome:
    """Trains ``task.params`` in place. ``work``: a folder of this run's own for pairs and state; both are resumed. None
    keeps neither.

    Raises ValueError in one sentence for a mode that needs pictures and has none, and for settings that do not fit.
    """
    mode = MODES[settings.row.way]
    if mode.pictures and task.pictures is None:
        raise ValueError(f"{settings.row.way} learns from pictures: connect the latents of some")
    train_on = held = None
    if not mode.pictures:  # beside one's own pictures the teacher draws only what is measured on
        learned = settings.row.pairs if mode.pairs or task.pictures is None else 0
        train_on, held = _cut(_pairs(task, settings, learned, work, tell))
    before = mode.measure(task, settings, held)
    results = mode.train(task, settings, train_on, work, watch)
    losses = tuple(x for r in results for x in r.losses)
    notes = tuple(n for r in results for n in r.notes)
    seconds, kept = sum(r.seconds for r in results), all(r.kept for r in results)
    return Outcome(before, mode.measure(task, settings, held), losses, seconds, notes, kept)


def _pairs(task: Task, settings: Settings, learned: int, work: File | None, tell: Tell) -> reflow.Pairs:
    """``learned`` pairs and `EXTRA` more."""
    making = reflow.Making(
        learned + EXTRA, task.shape, settings.row.teacher_steps, settings.row.cfg, settings.plan.seed,
        about=settings.about,
    )  # fmt: skip

    folder = None if work is None else work / "pairs"

    def say(done: int, total: int) -> None:
        tell("pictures of the teacher", done, total)

    return reflow.make((task.teacher, task.path), (task.cond, task.empty), making, folder, say, task.device)


def _cut(made: reflow.Pairs) -> tuple[reflow.Pairs, reflow.Pairs]:
    """(what is trained on, what is measured on)."""
    parts = (made.noise, made.x1, made.row)
    return reflow.Pairs(*(p[:-EXTRA] for p in parts)), reflow.Pairs(*(p[-EXTRA:] for p in parts))


def _pictures(task: Task, pairs: reflow.Pairs | None, count: int) -> consistency.Source:
    """Batches of pictures with their prompts: the user's, else the teacher's."""

    def source(_step: int, generator: torch.Generator) -> consistency.Batch:
        own = task.pictures is not None
        index = torch.randint(len(task.pictures if own else pairs), (count,), generator=generator)
        x = (task.pictures if own else pairs.x1)[index.to(task.pictures.device if own else "cpu")].to(task.device)
        rows = index % len(task.cond) if own else pairs.row[index]
        empty = None if task.empty is None else [task.empty] * count
        return consistency.Batch(x, paths.pick(task.cond, rows), empty)

    return source


def _phases(s: Settings) -> phased.Phases:
    return phased.Phases(s.consistency.skip, s.consistency.omega, count=s.row.steps)


def _taught(distance: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda task, student, *seen, settings: distance(student, task.teacher, *seen, task.path, settings)


def _alone(distance: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda task, student, *seen, settings: distance(student, *seen, task.path, settings)


def _consistent(distance: Callable[..., Tensor], settings_of: Callable) -> Callable:
    """A way that compares the student with f-, its moving average, at two times. The average is handed to the loop as
    parameters without gradients, so that its state is kept too.
    """

    def run(task: Task, s: Settings, pairs, work: File, watch: Watch) -> list[Result]:
        settings, source = settings_of(s), _pictures(task, pairs, s.plan.batch)
        targets = [nn.Parameter(p.detach().clone(), requires_grad=False) for p in task.params]
        student = consistency.Student(task.student, progressive.held(task.student, task.params, targets))
        loss = consistency.objective(partial(distance, task, student, settings=settings), source, task.path, settings)

        def averaging(step: int, g: torch.Generator) -> Tensor:
            if step:
                with torch.no_grad():
                    torch._foreach_lerp_(targets, [p.detach() for p in task.params], 1 - TARGET)
            return loss(step, g)

        return [train(s.plan, [*task.params, *targets], averaging, work, watch)]

    return run


def _reflow(task: Task, s: Settings, pairs, work: File, watch: Watch) -> list[Result]:
    def loss(_step: int, g: torch.Generator) -> Tensor:
        index = torch.randint(len(pairs), (s.plan.batch,), generator=g)
        t = reflow.uniform(task.path, s.plan.batch, g).to(task.device)
        return reflow.reflow(task.student, batch_of(task, pairs, index), task.path, t)

    return [train(s.plan, task.params, loss, work, watch)]


def _one_step(task: Task, s: Settings, pairs, work: File, watch: Watch) -> list[Result]:
    def loss(_step: int, g: torch.Generator) -> Tensor:
        index = torch.randint(len(pairs), (s.plan.batch,), generator=g)
        return reflow.one_step(task.student, batch_of(task, pairs, index), task.path)

    return [train(s.plan, task.params, loss, work, watch)]


def _progressive(task: Task, s: Settings, pairs, work: File, watch: Watch) -> list[Result]:
    """One run a halving; the plan's steps are shared evenly between them."""
    counts = progressive.rounds(s.row.start, s.row.steps)
    source, teacher, out = _pictures(task, pairs, s.plan.batch), None, []
    for i, count in enumerate(counts):
        plan = replace(s.plan, name=f"{s.plan.name}-{count}", steps=max(1, s.plan.steps // len(counts)))
        plan = replace(plan, seed=s.plan.seed + i, warmup=min(plan.warmup, plan.steps // 10))
        loss = _halving(task, s, source, teacher, count)
        shown = _shifted(watch, i * plan.steps, len(counts) * plan.steps)
        out.append(train(plan, task.params, loss, work, shown))
        kept = [p.detach().clone() for p in task.params]
        teacher = progressive.held(task.student, task.params, kept)
    return out


def _halving(task: Task, s: Settings, source, teacher: Model | None, count: int) -> Callable:
    """The loss of one round. ``teacher`` None: the guided one."""

    def loss(step: int, g: torch.Generator) -> Tensor:
        batch = source(step, g)
        at = progressive.interval(task.path, count, g, len(batch.x))
        at = tuple(None if t is None else t.to(task.device) for t in at)
        noise = torch.randn(batch.x.shape, generator=g).to(task.device)
        first = (task.teacher, batch.cond, batch.empty, s.row.cfg)
        answer = paths.guided(*(first if teacher is None else (teacher, batch.cond, None, 1.0)))
        z = task.path.noised(batch.x, noise, at[0])
        return progressive.loss(paths.guided(task.student, batch.cond, None, 1.0), answer, task.path, z, at)

    return loss


def _shifted(watch: Watch, before: int, total: int) -> Watch:
    return replace(watch, step=lambda done, _total, loss: watch.step(before + done, total, loss))


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
    stops = paths.times(len(task.path), s.row.steps, len(task.path) // s.consistency.skip)
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


@dataclass(frozen=True)
class Mode:
    """``pictures``: it cannot do without the user's. ``pairs``: it needs the teacher's, whatever the user has."""

    train: Callable
    measure: Callable
    pictures: bool = False
    pairs: bool = False


_few = by_euler(lambda s: s.row.steps)
MODES: dict[str, Mode] = {  # of `recipes.WAYS`
    "lcm": Mode(_consistent(_taught(consistency.lcd), lambda s: s.consistency), by_lcm),
    "lcf": Mode(_consistent(_alone(consistency.lcf), fine), by_lcm, pictures=True),
    "phased": Mode(_consistent(_taught(phased.distance), _phases), _few),
    "reflow": Mode(_reflow, _few, pairs=True),
    "one_step": Mode(_one_step, by_euler(lambda s: 1), pairs=True),
    "progressive": Mode(_progressive, _few),
}


@dataclass(frozen=True)
class Prompts:
    """What is learned from. ``cond``, ``empty``, ``shape``, ``pictures``: see `Task`. ``digest``: of all of it."""

    cond: Cond
    empty: object | None
    shape: tuple[int, ...]
    pictures: Tensor | None = None
    digest: str = ""


def settings_of(row: recipes.Distill, base: Base, about: str) -> Settings:
    """``row`` for `train_task`. The guidance that is built in is the teacher's."""
    guided = max(0.0, row.cfg - 1)
    return Settings(row, plan_of(row.way, row, base.dtype), about, consistency.Consistency(omega=(guided, guided)))


def run(
    models: tuple[Base, Base | None], prompts: Prompts, row: recipes.Distill, place: Place, watch: Watch, tell: Tell
) -> Made:
    """The LoRA that ``row`` asks for, as a file. ``models``: what it is for, and its teacher; None: itself without the
    LoRA.
    """
    base, other = models
    about = signature(bases=[m and m.digest for m in models], inputs=prompts.digest, settings=asdict(row))
    settings, size = settings_of(row, base, about), file_bytes(base.module, row.rank)

    def work(folder: File | None) -> Made:
        adapters = adapters_of(base, row.rank, row.seed)
        with adapters.attached(watch.check):
            out = train_task(_task(base, other, adapters, prompts), settings, folder, watch, tell)
        text = report(row, out, len(adapters.factors))
        info = metadata(row, base, place.title)
        return Made(adapters.state_dict(rename=base.names), info, text, out.losses, out.kept, out.notes)

    need = 2 * STATES * size + (row.pairs + EXTRA) * 2 * math.prod(prompts.shape)  # f- has a state, too
    return finished(place, about, f"Distill to Few Steps, {row.way}, {row.updates} updates", need, work)


def _task(base: Base, other: Base | None, adapters: Adapters, prompts: Prompts) -> Task:
    student, path = paths.view(base.denoiser)
    asked = student if other is None else paths.view(other.denoiser)[0]

    def teacher(*given):
        with adapters.off():
            return asked(*given)

    return Task(student, teacher, adapters.parameters(), path, prompts.cond, prompts.empty, prompts.shape,
                prompts.pictures, base.device)  # fmt: skip


def metadata(row: recipes.Distill, base: Base, title: str) -> dict[str, str]:
    """What the LoRA file says of itself: how it was made, on what, and how it is sampled."""
    guided = max(0.0, row.cfg - 1)
    details = {**asdict(row), "omega": [guided, guided], "base_sha256": base.digest,
               "sampling": distilled.words(row.way, row.steps)}  # fmt: skip
    about = record(method=f"distill {row.way}", **distilled.record(row.way, row.steps, base.family))
    return {"modelspec.title": title, distilled.KEY: json.dumps(details, sort_keys=True), **about}


def report(row: recipes.Distill, outcome: Outcome, layers: int) -> str:
    """Markdown for a person."""
    what = "consistency loss" if row.way == "lcf" else "distance to the teacher's pictures"
    change = outcome.after / outcome.before - 1 if outcome.before else 0.0
    return "\n".join([
        f"| way | {row.way}: {recipes.WAYS[row.way]} |",
        "|---|---|",
        f"| sample with | {distilled.words(row.way, row.steps)} |",
        f"| updates | {len(outcome.losses)} of {row.batch} pictures, rate {row.rate:g} |",
        f"| layers | {layers}, rank {row.rank} |",
        f"| {what} | {outcome.before:.5f} -> {outcome.after:.5f} ({change:+.1%}) |",
        f"| time of training | {outcome.seconds:.0f} s |",
    ])  # fmt: skip
