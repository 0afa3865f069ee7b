"""Everything a domain says, done to a MODEL and a CLIP: LoRAs, prompts, few-step sampling, an empty latent."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.samplers
import torch

from ... import demo
from ...families import PRESETS
from ...families.preset import Preset
from ...families.spec import DEFAULT_RUN, Variant
from ...lora.status import APPLIED
from ...prompts import expand, record
from ...prompts.spec import AUTO, Domain
from ...sampling import detect
from .. import files
from . import lora as loras
from . import prompts, sampling

log = logging.getLogger(__name__)
IF_PRESENT, REQUIRED, NONE = "if present", "required", "none"
FEW, ORDINARY = "few steps", "ordinary"
FEW_STEPS_MAX = 12  # a preset of more steps is no few-step preset


@dataclass(frozen=True)
class Wish:
    """What a person sets at the node. ``steps``, ``width``, ``height`` 0: as the preset and the domain say."""

    domain: str
    subject: str
    seed: int
    style: str
    overrides: str
    lora: str
    sampling: str
    steps: int
    width: int
    height: int
    batch: int


@dataclass(frozen=True)
class LoraFile:
    """A LoRA to apply, and where it lies."""

    name: str
    path: str
    strength: float
    strength_clip: float


@dataclass
class Plan:
    """What is going to be done, and the sentences about it."""

    loras: list[LoraFile]
    missing: list[dict]
    notes: list[str]
    preset: Preset | None = None
    steps: int = 0


def run(model, clip, wish: Wish, graph: sampling.Graph, hidden) -> tuple:
    """(MODEL, positive, negative, SAMPLER, SIGMAS, LATENT, cfg, what was chosen) for ``wish``. Raises ValueError."""
    variant = sampling.variant_of(model)
    family = variant.id if variant else None
    domain = prompts.find(wish.domain)
    style = prompts.style_of(clip) if wish.style == AUTO else wish.style
    first = prompts.one(wish.domain, wish.subject, wish.seed, style, wish.overrides)
    plan = Plan([], [], [])
    if wish.lora != NONE:
        _plan_style(plan, domain, family, first, wish)
    _plan_steps(plan, domain, family, model, wish, graph)
    used = {lora.name for lora in plan.loras}
    words = ", ".join(w.trigger for w in expand.loras(domain, family, first.chosen) if w.file in used and w.trigger)
    given = expand.parse_overrides(wish.overrides)
    prompt = expand.resolve(domain, wish.subject, wish.seed, style, given, words)
    for lora in plan.loras:
        model, clip, note = applied(model, clip, lora)
        plan.notes += [note] if note else []
    width, height = domain.size(family)
    size = (wish.width or width, wish.height or height)
    model, sampler, sigmas, cfg, guidance = _sampling(plan, variant, model, size, graph, wish)
    applied_ones = [{"file": lora.name, "strength": lora.strength} for lora in plan.loras]
    more = {"choice": wish.domain, "family": family or "unknown", "size": list(size), "loras": applied_ones,
            "preset": plan.preset.id if plan.preset else "", "missing": plan.missing, "notes": plan.notes}  # fmt: skip
    text = prompts.note(record.of(prompt, **more), hidden)
    sampling.say("\n".join([prompt.positive, *plan.notes]), graph.node)
    for sentence in plan.notes:
        log.warning("%s: %s", wish.domain, sentence)
    positive, negative = (encoded(clip, t, guidance) for t in (prompt.positive, prompt.negative))
    return model, positive, negative, sampler, sigmas, empty(model, size, wish.batch), cfg, text


def find_lora(file: str) -> tuple[str, str] | None:
    """(name, path) of a LoRA by its file name, in any folder of models/loras."""
    for name in files.names("loras"):
        if name.replace("\\", "/").rpartition("/")[2].lower() == file.lower():
            return name, files.path("loras", name)
    return None


def _plan_style(plan: Plan, domain: Domain, family: str | None, prompt: expand.Prompt, wish: Wish) -> None:
    """The domain's own LoRAs for the family; each that is not there is named with its link."""
    for lora in expand.loras(domain, family or "", prompt.chosen):
        found = find_lora(lora.file)
        if found is not None:
            plan.loras.append(LoraFile(lora.file, found[1], lora.strength, lora.strength))
        else:
            _missing(plan, lora.file, lora.link, wish, "the picture is drawn without it")


def _missing(plan: Plan, file: str, link: str, wish: Wish, instead: str) -> None:
    where = "is missing from this installation of the pack" if link == "shipped" else "is not in models/loras"
    get = f"; get it at {link}" if link.startswith("https") else ""
    if wish.lora == REQUIRED:
        raise ValueError(f"the LoRA {file} of {wish.domain} {where}{get}, or set 'lora' to '{IF_PRESENT}'")
    plan.missing.append({"file": file, "link": link})
    plan.notes.append(f"the LoRA {file} {where}{get}: {instead}")


def _plan_steps(plan: Plan, domain: Domain, family: str | None, model, wish: Wish, graph: sampling.Graph) -> None:
    """Which preset: the model's own when it is distilled already, else the domain's with its LoRA, else none."""
    if wish.sampling == ORDINARY:
        return
    facts = sampling.facts_of(model, [file for file, _ in sampling.files_of(model, graph)])
    try:
        match = detect.detect(facts)
    except ValueError:
        match = None
    if match is not None and match.preset.steps <= FEW_STEPS_MAX:
        plan.preset, plan.steps = match.preset, match.steps
        return
    row = PRESETS.get(domain.presets.get(family or "", ""))
    if row is None:
        plan.notes.append(f"{domain.id} has no few-step preset for this model; it is drawn in ordinary steps")
    elif not row.lora:
        plan.notes.append(f"{row.title} is a model of its own ({row.source}); this one is drawn in ordinary steps")
    else:
        _plan_distilled(plan, row, family, wish)


def _plan_distilled(plan: Plan, row: Preset, family: str | None, wish: Wish) -> None:
    own = {p.name for p in demo.LORAS.values()}  # made for the demo model, whatever base their names would fit
    listed = (n for n in files.names("loras") if (Path(n).name in own) == (family == "demo"))
    found = [(n, files.path("loras", n)) for n in listed if re.search(row.names, Path(n).name, re.IGNORECASE)]
    if not found:
        _missing(plan, f"{row.lora}.safetensors", row.source, wish, "the picture takes ordinary steps, which is slower")
        return
    path = str(found[0][1])
    hit = re.search(row.names, Path(path).name, re.IGNORECASE)
    plan.steps = int((hit.groupdict().get("steps") if hit else 0) or 0)
    plan.preset = row
    plan.loras.append(LoraFile(Path(path).name, path, row.lora_strength, 0.0))


def applied(model, clip, lora: LoraFile):
    """(model, clip, what was left out or "") with ``lora``. Raises ValueError when none of its keys fits."""
    choice = loras.Choice(lora.name, lora.path, lora.strength, lora.strength_clip)
    try:
        model, clip, said = loras.apply_one(choice, model, clip)
    except ValueError as e:
        raise ValueError(f"{e}. Or take it out of models/loras, or set 'lora' to '{NONE}'") from e
    left = len(said.status) - said.count(*APPLIED)
    note = f"{lora.name}: {left} of its {len(said.status)} keys are not applied: {said.reasons()}"
    return model, clip, "" if said.whole else note


def _sampling(
    plan: Plan, variant: Variant | None, model, size: tuple[int, int], graph: sampling.Graph, wish: Wish
) -> tuple:
    """(MODEL, SAMPLER, SIGMAS, cfg, distilled guidance or None)"""
    row = plan.preset
    if row is None and variant is not None:
        row = PRESETS.get(variant.ordinary_preset)
    if row is not None:
        steps = wish.steps or plan.steps
        ready = sampling.prepare(model, sampling.Run(row.id, steps, wish.seed, 1.0), size, graph)
        return ready.model, ready.sampler, ready.sigmas, ready.cfg, ready.preset.guidance
    name, scheduler, steps, cfg = (variant and variant.ordinary) or DEFAULT_RUN
    levels = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(levels, scheduler, wish.steps or steps).cpu()
    return model, comfy.samplers.sampler_object(name), sigmas, cfg, None


def encoded(clip, text: str, guidance: float | None):
    """CONDITIONING of ``text``, as CLIPTextEncode makes it, with FLUX's distilled guidance where there is one."""
    out = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return out if guidance is None else [[c, {**extra, "guidance": guidance}] for c, extra in out]


def empty(model, size: tuple[int, int], batch: int) -> dict:
    """An empty LATENT of ``size`` pixels in the model's own channels."""
    form = model.get_model_object("latent_format")
    ratio = form.spacial_downscale_ratio
    device, dtype = comfy.model_management.intermediate_device(), comfy.model_management.intermediate_dtype()
    shape = (batch, form.latent_channels, size[1] // ratio, size[0] // ratio)
    return {"samples": torch.zeros(shape, device=device, dtype=dtype), "downscale_ratio_spacial": ratio}
