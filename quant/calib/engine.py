"""Calibrates a whole module: collect, solve layer after layer, give memory back, go on.

Peak memory above the module itself: the reservoirs of one run (``budget`` bytes on the CPU) and one layer in float32 on
the device that solves, `working_bytes`; `peak_bytes` adds them up. The module is not changed; `modules.install` puts
the results where they belong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ..checks import naming, narrowed, require_finite, require_float
from ..modules import moved
from ..policy import LayerPlan
from ..schemes import KEEP
from . import allocate
from .observe import DEFAULT_BUDGET, Observer, Reservoir, limit_for, runs_needed
from .presets import Preset
from .solve import Sample, Solved, solve_best

METHOD = 2  # goes up when the same inputs give other layers, so that those kept by an unfinished run are not taken


@dataclass(frozen=True)
class Job:
    """What to calibrate and how.

    run        repeats one and the same set of forward passes of the module
    weight     the float weight and bias of a layer, as they shall be quantized (adapters merged)
    place      a layer's name -> the submodule that is handed its input (where a file fuses what a module keeps apart)
    budget     bytes of all token reservoirs together
    fit        bytes that all planned layers may take in the file; None: the plans as they are
    promote    relative output error over which a layer leaves 4 bits; None: never
    """

    plans: Mapping[str, LayerPlan]
    preset: Preset
    dtype: torch.dtype
    run: Callable[[], None]
    weight: Callable[[str], tuple[Tensor, Tensor | None]]
    place: Callable[[str], str] = lambda name: name
    device: str = "cpu"
    seed: int = 0
    budget: int = DEFAULT_BUDGET
    fit: int | None = None
    promote: float | None = allocate.PROMOTE_OVER


@dataclass(frozen=True)
class Layer:
    """One solved layer: its plan, what came out, tokens it saw, seconds it took. ``away``: what came out is in the
    store, and here without values.
    """

    name: str
    plan: LayerPlan
    shape: tuple[int, int]
    solved: Solved
    tokens: int
    seconds: float
    away: bool = False


class Store(Protocol):
    """Keeps solved layers of an unfinished run, what its observations saw (``run``: which of them), and the plans that
    fit a budget; see calibration.resume for one on disk. ``put``: whether the layer is kept.
    """

    def get(self, name: str) -> Layer | None: ...

    def put(self, layer: Layer) -> bool: ...

    def recall(self, run: int, observer: Observer) -> bool: ...

    def remember(self, run: int, observer: Observer) -> None: ...

    def plans(self) -> dict[str, LayerPlan] | None: ...

    def put_plans(self, plans: Mapping[str, LayerPlan]) -> None: ...


@dataclass
class Watch:
    """How the outside follows a run: ``layer`` after each solved one, ``check`` often; both may raise to stop it."""

    layer: Callable[[Layer, int, int], None] = lambda _layer, _done, _total: None
    check: Callable[[], None] = lambda: None
    store: Store | None = None


class Collection:
    """The input samples of a module's layers: collected on the first walk, kept for the next if one run held all."""

    def __init__(
        self, module: nn.Module, job: Job, names: list[str], check: Callable[[], None], store: Store | None = None
    ):
        self.module, self.job, self.names, self.store, self.run = module, job, names, store, 0
        self.by_place: dict[str, list[str]] = {}
        for name in names if job.preset.needs_data else ():
            self.by_place.setdefault(job.place(name), []).append(name)
        widths = {n: module.get_submodule(n).in_features for n in self.by_place}
        self.observer = Observer(widths, job.preset.tokens, job.seed, job.budget, check)
        self._kept: dict[str, Reservoir] | None = None

    def walk(self) -> Iterator[tuple[str, Sample | None]]:
        """(layer, its input sample) for every layer; None for those that no forward pass reaches."""
        reached = set()
        for reservoirs in [self._kept] if self._kept is not None else self._runs():
            for lead, reservoir in reservoirs.items():
                tokens = reservoir.tokens().to(self.job.device).float()
                sample = Sample(tokens, reservoir.maxima.to(self.job.device), reservoir.lowest)
                for name in (n for place in self.observer.members(lead) for n in self.by_place[place]):
                    reached.add(name)
                    yield name, sample
        for name in self.names:
            if name not in reached:
                yield name, None

    def _runs(self) -> Iterator[dict[str, Reservoir]]:
        if not self.by_place:
            return
        self.observer.forget()
        self.run = 0
        for reservoirs in runs_needed(self.observer, self._run, self.module):
            if not self.observer.waiting and len(reservoirs) == len(set(self.observer.leader.values())):
                self._kept = dict(reservoirs)
            yield reservoirs

    def _run(self) -> None:
        """The job's run; from the store where a run that was stopped got that far."""
        if self.store is None or not self.store.recall(self.run, self.observer):
            self.job.run()
            if self.store is not None:
                self.store.remember(self.run, self.observer)
        self.run += 1


def calibrate(module: nn.Module, job: Job, watch: Watch | None = None, hold: bool = True) -> dict[str, Layer]:
    """Solves every planned layer of ``module``; returns them by name in the order of the plan, with the plan they got.

    Layers that no forward pass reaches, and all of them under a preset without data, are solved from their weights.
    Whether a layer's activations are unsigned is what its input says, where one was seen. They are solved on the job's
    device, and kept on the CPU. ``hold``: keep the weights in memory, also those that the store has taken.
    """
    watch = watch or Watch()
    wanted = [n for n, p in job.plans.items() if p.scheme != KEEP]
    done: dict[str, Layer] = {}
    for name in wanted if watch.store else ():
        kept = watch.store.get(name)
        if kept is not None:
            done[name] = kept if hold else _away(kept)
    if len(done) == len(wanted):
        return {n: done[n] for n in wanted}
    # All layers are watched, also those that are done, so that the others share their inputs with the same ones.
    collection = Collection(module, job, wanted, watch.check, watch.store)
    plans = job.plans if job.fit is None else _fitted(collection, job, watch)
    for name, sample in collection.walk():
        watch.check()
        if name in done:
            continue
        layer = _solve(name, sample, plans[name], job)
        if watch.store and watch.store.put(layer) and not hold:
            layer = _away(layer)
        done[name] = layer
        watch.layer(layer, len(done), len(wanted))
    return {n: done[n] for n in wanted}


def _away(layer: Layer) -> Layer:
    return replace(layer, solved=_solved_on(layer.solved, "meta"), away=True)


def _solved_on(solved: Solved, device: str) -> Solved:
    bias = None if solved.bias is None else solved.bias.to(device)
    return replace(solved, weight=moved(solved.weight, device), bias=bias)


def _fitted(collection: Collection, job: Job, watch: Watch) -> dict[str, LayerPlan]:
    """Plans within ``job.fit`` bytes, by each layer's quickly measured error."""
    kept = watch.store.plans() if watch.store else None
    if kept is not None:
        return kept
    options: dict[str, list[allocate.Option]] = {}
    for name, sample in collection.walk():
        watch.check()
        weight, _ = _float_weight(name, job)
        with naming(name):
            options[name] = allocate.measure(weight, sample, job.plans[name], job.preset, job.seed)
    plans = allocate.fit(options, job.fit)
    if watch.store:
        watch.store.put_plans(plans)
    return plans


def _float_weight(name: str, job: Job) -> tuple[Tensor, Tensor | None]:
    """(weight in float32 where it is solved, bias) of a layer. Raises ValueError for one that cannot be quantized."""
    weight, bias = job.weight(name)
    try:
        require_float(weight)
    except ValueError as e:
        raise ValueError(f"layer {name}: {e}. Quantize the 16-bit original instead") from e
    weight = weight.to(job.device).float()
    with naming(name):
        require_finite(weight)
    return weight, bias


def _solve(name: str, sample: Sample | None, plan: LayerPlan, job: Job) -> Layer:
    start = time.perf_counter()
    weight, bias = _float_weight(name, job)
    bias = None if bias is None else bias.to(job.device)
    with naming(name):
        if plan.scheme == KEEP:
            solved = Solved(narrowed(weight, job.dtype), bias, 0.0, float("nan"), False)
        else:
            plan, solved = solve_best(weight, bias, sample, plan, job.preset, job.dtype, job.seed)
        if sample is not None and job.promote is not None:
            plan, solved = allocate.promoted(weight, bias, sample, plan, solved, job.promote, job.dtype)
    tokens = 0 if sample is None else len(sample.tokens)
    solved = _solved_on(solved, "cpu")  # the device has room for one layer's work, not for a model
    return Layer(name, plan, tuple(weight.shape), solved, tokens, time.perf_counter() - start)


def peak_bytes(shapes: Mapping[str, tuple[int, int]], job: Job) -> int:
    """An upper bound of what `calibrate` takes above the module and its forward pass, in bytes: the reservoirs, the one
    layer being solved, and what is solved already. ``shapes``: (N, K) of every planned layer.
    """
    widest = max(k for _, k in shapes.values())
    reservoirs = max(job.budget, 2 * widest * limit_for(widest, job.preset.tokens)) if job.preset.needs_data else 0
    working = max(working_bytes(*shape, job.preset) for shape in shapes.values())
    return reservoirs + working + solved_bytes(shapes, {n: job.plans[n] for n in shapes})


def solved_bytes(shapes: Mapping[str, tuple[int, int]], plans: Mapping[str, LayerPlan]) -> int:
    """Bytes of all planned layers once they are solved."""
    return sum(allocate.stored_bytes(plan, shapes[n]) + 4 * shapes[n][0] for n, plan in plans.items())


def working_bytes(n: int, k: int, preset: Preset) -> int:
    """An upper bound of what solving one (N, K) layer takes on its device, in bytes.

    Float32: the weight and five more of its size (target, search, missed, branch product), three of the tokens' size,
    two Gram matrices, and two more for GPTQ's factors.
    """
    tokens = max(1024, min(preset.tokens, 2 * k))
    grams = (2 + 3 * preset.gptq) * k * k if preset.needs_data else 0
    return 4 * (7 * n * k + 4 * tokens * k + 2 * tokens * n // 8 + grams)
