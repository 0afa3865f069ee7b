"""Which preset a diffusers pipeline is sampled by, and what it then visits: the same table as the nodes'."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from .. import families
from ..checkpoints import header
from ..checkpoints.errors import CheckpointError
from ..families.preset import Preset
from ..families.spec import DEFAULT_RUN, Variant
from ..lora import peft
from ..sampling import detect, presets, schedules
from . import pipeline

NONE = "none"
DEMO = "demo"


@dataclass(frozen=True)
class Sampling:
    """How to draw. ``row`` None: by the pipeline's own scheduler. ``guidance``: what is built into the model, if any.
    ``notes``: sentences for the person.
    """

    row: Preset | None
    steps: int
    cfg: float
    guidance: float | None = None
    notes: tuple[str, ...] = ()
    match: detect.Match | None = None


def variant(pipe) -> Variant | None:
    """What people call the pipeline's denoiser, by its class and configuration; None for one that no family names."""
    module = pipeline.denoiser(pipe)
    return families.variant([type(module).__name__], module.config)


def family(pipe) -> str | None:
    """Whose presets are the pipeline's; None for one without presets."""
    return families.presets_of(variant(pipe))


def of_domain(pipe) -> str | None:
    """The variant's id, as domains name it."""
    found = variant(pipe)
    return found.id if found else None


def file_of(path: Path, strength: float | None = None) -> detect.File:
    """What the name and the header of a file say. What is neither safetensors nor PEFT has its name alone."""
    try:
        head = header.read(path / peft.WEIGHTS if path.is_dir() else path)
    except CheckpointError:
        return detect.File(path.name, strength)
    return detect.File(path.name, strength, head.metadata)


def facts(pipe, folder: Path, loras: Iterable[tuple[Path, float]], quantized: Path | None = None) -> detect.Facts:
    """What is known of ``pipe`` from ``folder`` with ``loras`` (file, strength), the last applied last."""
    files = [file_of(path, strength) for path, strength in reversed(list(loras)) if strength]
    files += [file_of(path) for path in (quantized, folder) if path is not None]
    if pipeline.denoiser(pipe).config.get("time_cond_proj_dim"):
        files.append(detect.File("the pipeline's UNet", keys=frozenset({detect.GUIDANCE_KEY})))
    return detect.Facts(family(pipe), type(pipeline.denoiser(pipe)).__name__, tuple(files))


def distillation(known: detect.Facts) -> detect.Match | None:
    """The preset of a LoRA of ``known`` that is a distillation, or of a full LCM; None where there is neither."""
    loras = replace(known, files=tuple(f for f in known.files if f.strength is not None or f.keys))
    match = detect.find(loras) if known.family else None
    return match if match is not None and match.file is not None else None


def lcm_row(known: detect.Facts) -> Preset:
    """The preset of an LCM-LoRA. Raises ValueError for a family that has none."""
    for row in presets.of_family(known.family or ""):
        if row.prediction == "lcm" and row.omega is None:
            return row
    what = families.TITLES.get(known.family, known.class_name)
    raise ValueError(f"--lcm: there is no LCM for {what}. Leave it out, or choose a --preset")


def match_of(choice: str, known: detect.Facts) -> detect.Match | None:
    """The preset named ``choice``, for "auto" the one that is recognised, or None for the pipeline's own scheduler."""
    if choice == NONE or (choice == detect.AUTO and known.family is None):
        return None
    if choice == detect.AUTO:
        return detect.find(known)
    if known.family is None:
        raise ValueError(f"--preset {choice}: there are no presets for {known.class_name}. Use --preset {NONE}")
    return detect.choose(choice, known)


def usual(pipe) -> tuple[int, float]:
    """(steps, cfg) of a model that is not distilled: its family's, or what diffusers takes its pipeline for."""
    found = variant(pipe)
    run = found.ordinary if found else None
    _, _, steps, cfg = run or DEFAULT_RUN
    return steps, cfg if run else pipeline.own_cfg(pipe)


def sampling(match: detect.Match | None, ordinarily: tuple[int, float], steps: int | None, cfg: float | None,
             guidance: float | None = None) -> Sampling:  # fmt: skip
    """How to draw by ``match``, with what a person set in place of the preset's; ``ordinarily``: (steps, cfg) without a
    preset. Raises ValueError where the preset has no such run.
    """
    if match is None:
        return Sampling(None, steps or ordinarily[0], ordinarily[1] if cfg is None else cfg, guidance)
    row = match.preset
    chosen = steps or (0 if row.fixed else match.steps) or row.steps
    schedules.visits(row, chosen)  # refuses a run that the preset does not have
    built_in = row.guidance if row.omega is None else row.omega
    scale = row.cfg_for(chosen) if cfg is None else cfg
    notes = [f"preset {row.id}, {match.why}: {presets.summary(row, chosen)}"]
    if row.sampler == "res_multistep":
        notes.append("sampled by euler, as the model's makers do; res_multistep is ComfyUI's own")
    file = match.file
    if file is not None and file.strength is not None and row.lora and file.strength != row.lora_strength:
        notes.append(f"{file.name} is applied at {file.strength:g}; it is made for {row.lora_strength:g}")
    if file is None and row.lora:
        notes.append(f"{row.id} is made by a LoRA, {row.lora}, and no file given says that it is one")
    return Sampling(row, chosen, scale, built_in if guidance is None else guidance, tuple(notes), match)


def set_up(pipe, plan: Sampling, denoise: float, size: tuple[int, int]) -> None:
    """Gives ``pipe`` the scheduler of ``plan`` for a picture of ``size`` pixels; ``denoise`` below 1 starts from a
    picture, and takes ``plan.steps`` steps, as ComfyUI counts them. Raises ValueError where the preset has no such run.
    """
    own = pipe.scheduler
    if plan.row is not None:
        from . import schedulers

        visits = schedules.visits(plan.row, plan.steps, denoise, size)
        pipe.scheduler = schedulers.scheduler(plan.row, visits, own.config)
    if hasattr(pipe, "get_timesteps"):
        pipe.get_timesteps = lambda *_, **__: _last(pipe.scheduler, plan.steps)


def _last(scheduler, steps: int):
    """(timesteps, how many): the last ``steps``, in place of the pipeline's share of them."""
    start = max(0, len(scheduler.timesteps) - steps * scheduler.order)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    return scheduler.timesteps[start:], steps
