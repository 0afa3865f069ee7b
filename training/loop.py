"""One resumable, deterministic training loop for everything that this pack trains.

A caller gives ``loss(step, generator) -> Tensor``; everything random in it comes from ``generator``, which is seeded by
(seed, step), so a run that was stopped and resumed equals one that was not. With ``accumulate`` n one update is the
mean of n calls, and ``step`` counts calls.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..writing.whole import WriteError
from . import optimizers
from .recipes import CONSTANT, COSINE, OPTIMIZERS, SCHEDULES
from .state import State

log = logging.getLogger(__name__)
SAVE_SECONDS, SAVE_SHARE, SAVE_COST = 60.0, 0.05, 0.02  # between two states, of the updates, of the run's time
SAVE_SPEED = 3e8  # bytes a second


@dataclass(frozen=True)
class Plan:
    """Hyper-parameters of one run. ``ema`` 0 keeps the last weights instead of their average; ``clip`` 0: no clipping.

    ``loss_scale``: the loss is multiplied by it and gradients divided again, for models that compute in float16.
    Raises ValueError for values outside their range.
    """

    name: str
    steps: int
    batch: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.999
    seed: int = 0
    schedule: str = COSINE
    accumulate: int = 1
    clip: float = 1.0
    optimizer: str = "adamw"
    loss_scale: float = 1.0

    def __post_init__(self):
        if self.steps < 1 or self.batch < 1 or self.accumulate < 1 or self.lr <= 0:
            raise ValueError("Steps, batch and accumulate must be 1 or more, and the learning rate above 0")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"Schedule {self.schedule!r} is none of {', '.join(SCHEDULES)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"Optimizer {self.optimizer!r} is none of {', '.join(OPTIMIZERS)}")


@dataclass(frozen=True)
class Watch:
    """How the outside follows a run: ``step(done, total, loss)`` after each, ``check`` before each forward and backward
    pass. Both may raise to stop it; what was reached is kept in ``work``.
    """

    step: Callable[[int, int, float], None] = lambda _done, _total, _loss: None
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Result:
    """``losses``: one a step, those before a resumption too. ``seconds``: of all parts of the run together. ``notes``:
    what was there of an earlier one, and what could not be kept or read again. ``kept``: the end is, on disk.
    """

    losses: tuple[float, ...] = field(repr=False)
    seconds: float
    notes: tuple[str, ...] = ()
    kept: bool = False


def loss_scale(dtype: torch.dtype) -> float:
    """Gradients of a model that computes in float16 vanish unless the loss is scaled up."""
    return 1024.0 if dtype == torch.float16 else 1.0


def learning_rate(plan: Plan, step: int) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak, or the peak."""
    if step < plan.warmup:
        return plan.lr * (step + 1) / plan.warmup
    if plan.schedule == CONSTANT:
        return plan.lr
    x = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * x)))


def generator(plan: Plan, step: int) -> torch.Generator:
    """The source of everything random in call ``step``."""
    return torch.Generator().manual_seed(plan.seed * 1_000_003 + step)


class Average:
    """Exponential moving average of parameters, with the usual ramp so that the first steps do not count. With decay 0
    it holds nothing.
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], decay: float):
        self.params, self.decay = list(params), decay
        self.values = [p.detach().clone() for p in params] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        if self.values:
            d = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.values, [p.detach() for p in self.params], 1 - d)

    @torch.no_grad()
    def copy_to(self) -> None:
        if self.values:
            for p, v in zip(self.params, self.values, strict=True):
                p.copy_(v)


def train(
    plan: Plan,
    params: Sequence[torch.nn.Parameter],
    loss: Callable[[int, torch.Generator], Tensor],
    work: Path | None = None,
    watch: Watch = Watch(),
    save_every: float = SAVE_SECONDS,
) -> Result:
    """Runs ``plan`` to its end and leaves the averaged weights in place. ``work``: folder of the resumable state
    ``<plan.name>.state.safetensors``, None for none. It is saved at the end, when the run is stopped, and every
    ``save_every`` seconds or `SAVE_SHARE` of the updates, but no more often than `SAVE_COST` of the time allows; after
    each update for 0 seconds. A state that cannot be written does not stop the run.

    Raises ValueError when the loss is not finite, or when ``work`` holds the state of another plan.
    """
    params = list(params)
    run = _Run(plan, params, loss, watch)
    state = None if work is None else State(work / f"{plan.name}.state.safetensors", plan, params)
    if state is not None:
        run.resume(state)
    began, before = time.monotonic(), run.seconds
    saver = Saver(plan.steps, len(run.losses), save_every, sum(4 * p.nbytes for p in params) / SAVE_SPEED)
    try:
        while len(run.losses) < plan.steps:
            run.backward()
            run.update()
            run.tell()
            now = time.monotonic()
            run.seconds = before + now - began
            if state is not None and saver.due(len(run.losses)):
                run.save(state)
                saver.saved(len(run.losses))
    except BaseException:
        if state is not None and run.whole:
            run.save(state)
        raise
    run.average.copy_to()
    return Result(tuple(run.losses), run.seconds, tuple(run.notes), run.kept)


class Saver:
    """Says when to save; see `train`. ``cost``: seconds that the first save is expected to take."""

    def __init__(self, steps: int, done: int, every: float, cost: float, clock: Callable[[], float] = time.monotonic):
        self.steps, self.done, self.every, self.cost, self.clock = steps, done, every, cost, clock
        self.began = self.at = self.asked = clock()
        self.spent = 0.0

    def due(self, done: int) -> bool:
        """Whether to save after update ``done``; `saved` is told afterwards."""
        self.asked = now = self.clock()
        if done == self.steps or not self.every:
            return True
        often = done - self.done >= SAVE_SHARE * self.steps or now - self.at >= self.every
        return often and self.spent + self.cost <= SAVE_COST * (now - self.began)

    def saved(self, done: int) -> None:
        self.done, self.at = done, self.clock()
        self.cost = self.at - self.asked
        self.spent += self.cost


class _Run:
    """What one run has reached. ``whole``: no update is half done, so the state may be saved."""

    def __init__(self, plan: Plan, params: list[torch.nn.Parameter], loss, watch: Watch):
        self.plan, self.params, self.loss, self.watch = plan, params, loss, watch
        self.optimizer = optimizers.make(plan, params)
        self.average = Average(params, plan.ema)
        self.losses: list[float] = []
        self.notes: list[str] = []
        self.seconds, self.whole, self.kept, self.value = 0.0, True, False, 0.0

    def backward(self) -> None:
        """Gradients of one update."""
        plan, done = self.plan, len(self.losses)
        self.optimizer.zero_grad(set_to_none=True)
        self.value = 0.0
        for call in range(done * plan.accumulate, (done + 1) * plan.accumulate):
            self.watch.check()
            value = self.loss(call, generator(plan, call)) / plan.accumulate
            self.value += value.item()
            if not math.isfinite(self.value):
                raise ValueError(f"The loss is not a number at step {done + 1}. Train with a lower learning rate")
            self.watch.check()
            (value * plan.loss_scale).backward()

    def update(self) -> None:
        plan, done = self.plan, len(self.losses)
        self.whole = False
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(plan, done)
        grads = [p.grad for p in self.params if p.grad is not None]
        if plan.loss_scale != 1:
            torch._foreach_div_(grads, plan.loss_scale)
        norm = torch.nn.utils.clip_grad_norm_(self.params, plan.clip) if plan.clip else torch.zeros(())
        if torch.isfinite(norm):
            self.optimizer.step()
        else:
            log.warning("step %d is left out: its gradients are not finite", done + 1)
        self.average.update(done)
        self.losses.append(self.value)
        self.whole = True

    def tell(self) -> None:
        done, total = len(self.losses), self.plan.steps
        if done % 50 == 0 or done == total:
            recent = self.losses[-50:]
            log.info("%s %d/%d loss %.5f  %.0f s", self.plan.name, done, total, sum(recent) / len(recent), self.seconds)
        self.watch.step(done, total, self.losses[-1])

    def save(self, state: State) -> None:
        self.kept = False
        try:
            state.save(self.optimizer, self.average.values, self.losses, self.seconds)
            self.kept = True
        except WriteError as e:
            note = f"What the run had reached could not be kept: {e}"
            if note not in self.notes:
                log.warning(note)
                self.notes.append(note)

    def resume(self, state: State) -> None:
        self.losses, self.seconds = state.load(self.optimizer, self.average.values)
        if state.note:
            log.warning(state.note)
            self.notes.append(state.note)
        if self.losses:
            done = f"{len(self.losses)} of {self.plan.steps} updates"
            self.notes.append(f"Went on with a run that was stopped: {done} were done already")
        self.kept = len(self.losses) == self.plan.steps
