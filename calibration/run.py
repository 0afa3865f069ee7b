"""One calibration, for the node and the command line: what is solved and how, what an unfinished run keeps, what the
file says of it. The callers say where the model is, and make of the solved layers what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.convert import described
from ..checkpoints.lazy import Asked
from ..checkpoints.save import fingerprint, signature
from ..families.spec import FamilySpec
from ..quant.calib import allocate, engine
from ..quant.calib.engine import Job, Layer, Watch
from ..quant.calib.presets import preset
from ..quant.policy import LayerPlan, plan, retarget
from ..quant.schemes import KEEP
from ..writing import unfinished
from . import report
from .resume import Folder


@dataclass(frozen=True)
class Settings:
    """What a person sets. ``budget``: bytes of the whole diffusion model, 0 for none. ``levels``, ``cfg``: how each
    prompt is sampled.
    """

    preset: str
    target: str
    rank: int
    budget: int
    levels: int
    cfg: float
    seed: int


@dataclass(frozen=True)
class Subject:
    """The float model. Names are native, without a prefix.

    module   what runs; ``place``: a layer's name -> the submodule that is handed its input
    shapes   (N, K) of every linear
    nbytes   what each tensor takes in the file if it is not quantized
    dtype    of scales and low-rank factors
    weight   a layer's float weight and bias, adapters merged
    sample   draws all ``prompts``, the same every time; ``drawn`` says of them what the result depends on
    """

    family: FamilySpec
    module: nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    nbytes: Mapping[str, int]
    dtype: torch.dtype
    weight: Callable[[str], tuple[Tensor, Tensor | None]]
    sample: Callable[[], None]
    prompts: int
    drawn: object
    device: str
    place: Callable[[str], str] = lambda name: name


@dataclass(frozen=True)
class Outcome:
    """``made``: what the caller made of the layers. ``notes``: sentences for the report."""

    made: object
    layers: dict[str, Layer]
    notes: tuple[str, ...]


def plans_of(shapes: Mapping[str, tuple[int, ...]], family: FamilySpec, settings: Settings) -> dict[str, LayerPlan]:
    """The plan of every linear. Raises ValueError where all of them stay as they are."""
    plans = retarget(plan(shapes, family.rules, settings.rank), shapes, settings.target)
    if all(p.scheme == KEEP for p in plans.values()):
        raise ValueError("Nothing in this model can be quantized: no linear layer has a width that is a multiple of 64")
    return plans


def other_bytes(nbytes: Mapping[str, int], plans: Mapping[str, LayerPlan]) -> int:
    """Bytes in the file of everything that is not a planned layer's weight, its header among them."""
    planned = {f"{n}.weight" for n, p in plans.items() if p.scheme != KEEP}
    rest = [size for name, size in nbytes.items() if name not in planned]
    return sum(rest) + allocate.file_overhead(len(planned), len(rest))


def file_bytes(subject: Subject, plans: Mapping[str, LayerPlan]) -> int:
    """Bytes of the file that is written by ``plans``."""
    kept = {n: p for n, p in plans.items() if p.scheme != KEEP}
    stored = sum(allocate.stored_bytes(p, subject.shapes[n]) for n, p in kept.items())
    return stored + other_bytes(subject.nbytes, plans)


def job_of(subject: Subject, settings: Settings, plans: Mapping[str, LayerPlan]) -> Job:
    """What the engine is told. Raises ValueError for a preset that needs prompts where there are none."""
    row = preset(settings.preset)
    if row.needs_data and not subject.prompts:
        raise ValueError(f"Preset {row.id} needs prompts to sample: connect CLIP and write some, or connect positive")
    return Job(
        plans={n: p for n, p in plans.items() if p.scheme != KEEP},
        preset=row,
        dtype=subject.dtype,
        run=subject.sample,
        weight=subject.weight,
        place=subject.place,
        device=subject.device,
        seed=settings.seed,
        fit=settings.budget - other_bytes(subject.nbytes, plans) if settings.budget else None,
    )


def signature_of(subject: Subject, settings: Settings, plans: Mapping[str, LayerPlan]) -> str:
    """Changes with anything that the result depends on."""
    planned = {n: p for n, p in plans.items() if p.scheme != KEEP}
    weights = fingerprint(Asked(planned, lambda n: subject.weight(n)[0]))
    return signature(
        weights=weights, drawn=subject.drawn, settings=asdict(settings), dtype=str(subject.dtype),
        plans={n: [p.scheme, p.rank, p.act_unsigned] for n, p in planned.items()}, method=engine.METHOD,
    )  # fmt: skip


def calibrate(
    subject: Subject,
    settings: Settings,
    root: Path,
    make: Callable[[dict[str, Layer], dict[str, str], Folder | None], object],
    watch: Watch,
    hold: bool = True,
) -> Outcome:
    """Solves every layer, and has ``make`` (layers, what the file says of itself, where layers that are ``away`` can be
    read) make the result. ``root``: where unfinished runs are kept until then. ``hold``: see `engine.calibrate`.
    """
    plans = plans_of(subject.shapes, subject.family, settings)
    job = job_of(subject, settings, plans)
    need = engine.solved_bytes(subject.shapes, job.plans)
    what = f"Calibrate to 4-bit, {subject.family.title}"
    with unfinished.run(root, signature_of(subject, settings, plans), what, need) as kept:
        store = None if kept.folder is None else Folder(kept.folder)
        layers = engine.calibrate(subject.module, job, Watch(watch.layer, watch.check, store), hold)
        about = described({n: x.plan for n, x in layers.items()}, settings.rank, subject.family,
                          method_of(settings, subject.prompts, layers))  # fmt: skip
        made = make(layers, about, store)
        kept.finish()
    return Outcome(made, layers, (*(store.notes() if store else ()), *kept.notes))


def method_of(settings: Settings, prompts: int, layers: Mapping[str, Layer]) -> dict:
    """What a file says of how its layers were solved."""
    method = {"method": settings.preset, "seed": settings.seed}
    if not preset(settings.preset).needs_data:
        return method
    t = report.totals(layers)
    counts = {"kept_calibrated": t["calibrated"], "unsigned": t["unsigned"]}
    error = {"error": t["error"]} if t["error"] == t["error"] else {}
    unreached = len(report.unreached(layers, settings.preset))
    drawn = {"prompts": prompts, "levels": settings.levels, "cfg": settings.cfg}
    return method | drawn | counts | error | {"unreached": unreached}
