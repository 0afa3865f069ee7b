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

from .adapters import Adapters, linears
from .checkpointing import checkpointed
from .data import Batches, Sample
from .denoise import Denoiser
from .loop import Plan, Result, Watch, train

# The linears of attention and feed-forward, in ComfyUI's and in diffusers' names; a model without any trains them all.
USUAL = ("attn", "attention", "ff.", "ffn", "feed_forward", "mlp", "linear1", "linear2")
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


def usual(names: Sequence[str]) -> list[str]:
    """The layers of ``names`` that a LoRA is usually made of: attention and feed-forward."""
    chosen = [n for n in names if any(part in n for part in USUAL)]
    return chosen or list(names)


def file_bytes(module: torch.nn.Module, rank: int) -> int:
    """Bytes of the LoRA that is trained on ``module``'s usual layers, in float32."""
    found = linears(module)
    shapes = [found[n].weight.shape for n in usual(list(found))]
    return sum(4 * (rank * (n + k) if rank else n * k) for n, k in shapes)


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
