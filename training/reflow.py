"""Reflow and one-step distillation on pairs of a teacher's own making. Sources: arXiv 2209.03003; InstaFlow,
2309.06380.

    pair        noise n, and x1 where the teacher's ODE ends from it
    y           z / (alpha + sigma) = (1 - tau) x + tau n: the coordinate in which an Euler step is straight
    line        y_tau = x1 + (tau / tau_T) (y_T - x1), y_T the sampler's start from n
    reflow      || (y_T - x1) / tau_T - v(y_tau) ||^2,  v = (y - x0(z, t)) / tau;   tau uniform in (0, tau_T)
    one step    || x1 - x0(z_T, T) ||^2

The model keeps its own parametrisation (epsilon, v or flow): in this coordinate each of them has a velocity, so what
is trained stays an ordinary model for the stock Euler sampler, and a LoRA suffices.

Pairs lie in safetensors shards: x1 (n, ...) float16, row (n,) int64 (which prompt). The noise of pair i is a function
of seed and i. A shard is written whole or not at all; those that are there, of the same making, are not made again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path as File

import torch
from torch import Tensor

from ..sampling.straightness import Straightness, measure
from ..writing import kept
from ..writing.whole import WriteError
from .paths import Answer, Cond, Model, Path, even, follow, guided, pick

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Making:
    """How pairs come to be. ``about``: a digest of model and prompts; pairs of another one are made anew."""

    count: int
    shape: tuple[int, ...]
    steps: int = 25
    cfg: float = 1.0
    seed: int = 0
    shard: int = 8
    about: str = ""

    def __post_init__(self):
        if min(self.count, self.steps, self.shard) < 1:
            raise ValueError("Pairs need at least one of each: count, steps, and pairs in a shard")

    def noise(self, index: int) -> Tensor:
        """The noise of pair ``index``, whatever shard it is in."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + index))


@dataclass(frozen=True)
class Pairs:
    """``noise``, ``x1``: (n, ...) float32 on the CPU; ``row``: (n,) the prompt of each."""

    noise: Tensor
    x1: Tensor
    row: Tensor

    def __len__(self) -> int:
        return len(self.x1)


def make(
    teacher: tuple[Model, Path],
    prompts: tuple[Cond, object | None],
    making: Making,
    folder: File | None,
    tell: Callable[[int, int], None] = lambda _done, _total: None,
    device: torch.device | str = "cpu",
) -> Pairs:
    """The pairs that ``making`` describes, from shards in ``folder`` (None: none are kept) or made now. ``prompts``:
    (one condition a prompt, the negative one or None). ``tell(done, total)`` is called before each evaluation of the
    teacher and may raise to stop. Pair i has prompt i modulo their number.
    """
    (model, path), (cond, empty) = teacher, prompts
    rows, parts = len(cond), []
    for first in range(0, making.count, making.shard):
        index = torch.arange(first, min(first + making.shard, making.count))
        where = None if folder is None else folder / f"pairs-{first:08}.safetensors"
        found = None if where is None else _read(where, making, len(index))
        if found is None:
            noise = torch.stack([making.noise(int(i)) for i in index]).to(device)
            batch = pick(cond, index % rows), None if empty is None else [empty] * len(index)
            answer = guided(model, *batch, making.cfg)
            stops = even(len(path), making.steps)
            _, answers = follow(answer, path, noise, stops, lambda at=first: tell(at, making.count))
            found = {"x1": answers[-1].half().cpu(), "row": index % rows}
            if where is not None:
                _write(where, found, making)
        parts.append((torch.stack([making.noise(int(i)) for i in index]), found["x1"].float(), found["row"]))
        tell(min(first + making.shard, making.count), making.count)
    return Pairs(*(torch.cat(t) for t in zip(*parts, strict=True)))


def _record(making: Making) -> str:
    kept = {k: v for k, v in asdict(making).items() if k != "count"}  # more pairs of the same making may follow
    return json.dumps(kept | {"shape": list(making.shape)}, sort_keys=True)


def _write(where: File, found: dict[str, Tensor], making: Making) -> None:
    try:
        kept.save(where, found, {"making": _record(making)}, durable=False)
    except WriteError as e:  # it is made again if the run is stopped
        log.warning("The teacher's pictures cannot be kept: %s", e)


def _read(where: File, making: Making, count: int) -> dict[str, Tensor] | None:
    """A shard of the same making; None for one that is absent, cut off, shorter, or another's."""
    try:
        found, values = kept.load(where)
    except kept.Damaged:
        return None
    if values.get("making") != _record(making):
        return None
    return found if found["x1"].shape == (count, *making.shape) and found["row"].shape == (count,) else None


@dataclass(frozen=True)
class Batch:
    """Some pairs with their conditioning, on the device that computes."""

    noise: Tensor
    x1: Tensor
    cond: Cond


def reflow(student: Model, batch: Batch, path: Path, t: Tensor) -> Tensor:
    """The rectified-flow loss at times ``t`` (B,), on the straight line between both ends of each pair."""
    last = torch.full_like(t, len(path) - 1)
    tau, size = path.share(t, batch.x1)
    most, most_size = path.share(last, batch.x1)
    beginning = path.start(batch.noise, len(path) - 1) / most_size
    y = batch.x1 + tau / most * (beginning - batch.x1)
    x0 = student(y * size, t, batch.cond)
    return ((beginning - batch.x1) / most - (y - x0) / tau).float().square().mean()


def one_step(student: Model, batch: Batch, path: Path) -> Tensor:
    """Squared distance of the model's only step to the teacher's end."""
    t = torch.full((len(batch.x1),), len(path) - 1, device=batch.x1.device)
    x0 = student(path.start(batch.noise, len(path) - 1), t, batch.cond)
    return (x0 - batch.x1).float().square().mean()


def uniform(path: Path, n: int, generator: torch.Generator) -> Tensor:
    """(n,) indices whose tau is uniform between 0 and that of the last."""
    tau = path.sigma / (path.alpha + path.sigma)
    return torch.searchsorted(tau, torch.rand(n, generator=generator) * tau[-1]).clamp(max=len(path) - 1)


def straightness(answer: Answer, path: Path, noise: Tensor, steps: int) -> Straightness:
    """S(Z) of the model's own trajectories from ``noise``: 0 means that one step is exact."""
    stops = even(len(path), steps)
    velocities, shares = [], []
    for stop, z, x0 in zip(stops, *follow(answer, path, noise, stops), strict=True):
        tau, size = path.share(torch.full((len(z),), stop, device=z.device), z)
        velocities.append(((z / size - x0) / tau).float().cpu())
        shares.append(float(tau.flatten()[0]))
    return measure(velocities, [*shares, 0.0])
