"""LoRA training: pictures and captions in, factors in an `Adapters` out, on a base of any precision.

The base is frozen; its 4-bit codes and low-rank branch are not touched. What was measured before and after is the loss
on pictures that were not trained on, at the same noise levels and with the same noise both times.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.save import signature
from . import recipes
from .adapters import Adapters
from .checkpointing import checkpointed
from .data import Batches, Example, Sample, split
from .denoise import Denoiser
from .job import STATES, Base, Made, Place, adapters_of, file_bytes, finished, plan_of
from .loop import Plan, Result, Watch, train

LEVELS = 4


@dataclass(frozen=True)
class Recipe:
    """What the plan does not say. ``dropout``: share of captions left empty; ``checkpointing``: less memory, a second
    forward pass instead.
    """

    plan: Plan
    dropout: float = 0.1
    checkpointing: bool = False


@dataclass(frozen=True)
class Outcome:
    """``before``, ``after``: validation loss; of pictures that were trained on where none were held out."""

    result: Result
    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after / self.before - 1


def objective(denoiser: Denoiser, samples: Sequence[Sample], recipe: Recipe):
    """``loss(step, generator)`` over ``samples``."""
    batches = Batches(samples)

    def loss(_step: int, generator: torch.Generator) -> Tensor:
        rows = batches(recipe.plan.batch, generator)
        x0 = torch.stack([s.latent for s in rows])
        noise = torch.randn(x0.shape, generator=generator)
        sigma = denoiser.draw(len(rows), generator)
        dropped = torch.rand(len(rows), generator=generator) < recipe.dropout
        conds = [s.empty if drop else s.cond for s, drop in zip(rows, dropped.tolist(), strict=True)]
        return denoiser.loss(x0.to(denoiser.device), noise.to(denoiser.device), sigma, conds)

    return loss


@torch.no_grad()
def validate(denoiser: Denoiser, samples: Sequence[Sample], seed: int = 0) -> float:
    """Mean loss of ``samples`` over `LEVELS` noise levels with fixed noise."""
    generator, losses = torch.Generator().manual_seed(seed), []
    for sample in samples:
        noise = torch.randn(LEVELS, *sample.latent.shape, generator=generator)
        sigma = denoiser.at((torch.arange(LEVELS) + 0.5) / LEVELS)
        x0 = sample.latent.expand_as(noise)
        losses.append(denoiser.loss(x0.to(sigma.device), noise.to(sigma.device), sigma, [sample.cond] * LEVELS))
    return float(torch.stack(losses).mean())


def train_lora(
    denoiser: Denoiser,
    adapters: Adapters,
    samples: tuple[Sequence[Sample], Sequence[Sample]],
    recipe: Recipe,
    work: Path | None = None,
    watch: Watch = Watch(),  # noqa: B008 - frozen
) -> Outcome:
    """Trains ``adapters`` on ``samples`` (to train on, held out). Resumes from ``work``; see `loop.train`."""
    learn, held = samples
    measured = held or learn
    with ExitStack() as stack:
        stack.enter_context(adapters.attached(watch.check))
        with adapters.off():
            before = validate(denoiser, measured)
        with ExitStack() as inner:
            if recipe.checkpointing:
                inner.enter_context(checkpointed(adapters.module))
            result = train(recipe.plan, adapters.parameters(), objective(denoiser, learn, recipe), work, watch)
        after = validate(denoiser, measured)
    return Outcome(result, before, after)


def signature_of(base: Base, pictures: Sequence[Example], row: recipes.Lora) -> str:
    """Of this very run: same model, pictures, captions and settings."""
    listed = [[e.path.name, e.path.stat().st_size, e.path.stat().st_mtime_ns, e.caption] for e in pictures]
    return signature(base=base.digest, pictures=listed, settings=asdict(row))


def run(
    base: Base, samples: Sequence[Sample], pictures: Sequence[Example], row: recipes.Lora, place: Place, watch: Watch
) -> Made:
    """The LoRA that ``row`` asks for on ``samples``, which are ``pictures`` as the model sees them, as a file."""
    recipe = Recipe(plan_of("lora", row, base.dtype), row.dropout, row.checkpointing)
    learn, held = ([samples[i] for i in part] for part in split(len(samples), row.hold_out, row.seed))

    def work(folder: Path | None) -> Made:
        adapters = adapters_of(base, row.rank, row.seed)
        outcome = train_lora(base.denoiser, adapters, (learn, held), recipe, folder, watch)
        info = metadata(recipe, outcome, len(samples), place.title)
        text = report(recipe, outcome, (len(learn), len(held)), len(adapters.factors))
        done = outcome.result
        return Made(adapters.state_dict(rename=base.names), info, text, done.losses, done.kept, done.notes)

    what = f"Train LoRA, {len(samples)} pictures, {row.updates} steps"
    need = STATES * file_bytes(base.module, row.rank)
    return finished(place, signature_of(base, pictures, row), what, need, work)


def metadata(recipe: Recipe, outcome: Outcome, pictures: int, title: str) -> dict[str, str]:
    """What a LoRA file says of itself; the names that other tools show, and ours."""
    details = {**asdict(recipe.plan), "dropout": recipe.dropout, "pictures": pictures,
               "validation": [outcome.before, outcome.after]}  # fmt: skip
    return {"modelspec.title": title, "format": "pt", "nibble_training": json.dumps(details)}


def report(recipe: Recipe, outcome: Outcome, pictures: tuple[int, int], layers: int) -> str:
    """Markdown for a person."""
    plan, (learned, held) = recipe.plan, pictures
    where = f"{held} pictures held out" if held else "the pictures trained on (none were held out)"
    first, last = _ends(outcome.result.losses)
    return "\n".join([
        f"| steps | {plan.steps} x {plan.batch} pictures, {plan.optimizer}, rate {plan.lr:g} {plan.schedule} |",
        "|---|---|",
        f"| pictures | {learned} trained on, {held} held out |",
        f"| layers | {layers} |",
        f"| loss while training | {first:.4f} -> {last:.4f} |",
        f"| validation loss, {where} | {outcome.before:.4f} -> {outcome.after:.4f} ({outcome.change:+.1%}) |",
        f"| time | {outcome.result.seconds:.0f} s |",
    ])  # fmt: skip


def _ends(losses: Sequence[float]) -> tuple[float, float]:
    n = max(1, len(losses) // 10)
    return sum(losses[:n]) / n, sum(losses[-n:]) / n
