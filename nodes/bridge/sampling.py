"""Few-step sampling in ComfyUI: facts about a MODEL, a preset made ready, and the run through ComfyUI's own sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.sample
import folder_paths
import torch
from comfy_extras.nodes_custom_sampler import SamplerCustom
from server import PromptServer

from ... import families
from ...checkpoints import header
from ...checkpoints.errors import CheckpointError
from ...families.preset import Preset
from ...families.spec import Variant
from ...reading.names import encodable
from ...sampling import presets, schedules
from ...sampling.detect import GUIDANCE_KEY, Facts, File, Match, choose, upstream_files
from ..files import SAFETENSORS
from . import model_sampling

FOLDERS = ("loras", "diffusion_models", "checkpoints")
LCM_GRID, TRAILING, TYPED = "LCM and TCD", "trailing", "typed list"
GRIDS = [LCM_GRID, TRAILING, TYPED]


@dataclass(frozen=True)
class Graph:
    """Where a node stands: the API-format prompt, and the node's id in it."""

    prompt: Mapping | None
    node: str | None


@dataclass(frozen=True)
class Ready:
    """A preset made ready: what ComfyUI's custom sampler takes, and the whole of it in words."""

    model: object
    sampler: object
    sigmas: torch.Tensor
    cfg: float
    preset: Preset
    text: str


@dataclass(frozen=True)
class Run:
    """What a person sets at the sampler. ``steps`` 0: the preset's own number."""

    preset: str
    steps: int
    seed: int
    denoise: float


def base_path(model) -> str | None:
    """The file that the MODEL was loaded from, where its loader left word of it."""
    init = getattr(model, "cached_patcher_init", None)
    path = init[1][0] if init and init[1] else None
    return path if isinstance(path, str) and Path(path).is_file() else None


def files_of(model, graph: Graph) -> list[tuple[File, str | None]]:
    """(file, where it lies) of what went into ``model``, last applied first: those above the node, then its base."""
    named = upstream_files(graph.prompt, str(graph.node)) if graph.prompt and graph.node else []
    out: dict[str, tuple[File, str | None]] = {}
    for file in named:
        paths = (folder_paths.get_full_path(folder, file.name) for folder in FOLDERS)
        out.setdefault(file.name, (file, next(filter(None, paths), None)))
    base = base_path(model)
    if base is not None and base not in [path for _, path in out.values()]:
        out.setdefault(Path(base).name, (File(Path(base).name), base))
    return [(_with_header(file, path), path) for file, path in out.values()]


def _with_header(file: File, path: str | None) -> File:
    """``file`` with what its header says; as it is where there is none to read (GGUF, pickle, gone)."""
    if path is None or not path.lower().endswith(SAFETENSORS):
        return file
    try:
        head = header.read(path)
    except CheckpointError:
        return file  # whoever loaded it has said so already
    keys = frozenset(k for k in head.tensors if k.endswith(GUIDANCE_KEY))
    return File(file.name, file.strength, head.metadata, keys)


def variant_of(model) -> Variant | None:
    """What people call the model, by ComfyUI's configuration of it; None for one that no family names."""
    config = model.model.model_config
    return families.variant([c.__name__ for c in type(config).__mro__], config.unet_config)


def facts_of(model, files: list[File]) -> Facts:
    """What is known of a MODEL made of ``files``."""
    lora = model.get_attachment("lora_metadata")
    told = [File("the applied LoRA", metadata=lora)] if isinstance(lora, Mapping) else []
    if model.get_attachment(model_sampling.OMEGA) is not None:
        told.append(File("LCM Guidance", keys=frozenset({GUIDANCE_KEY})))
    distilled = any(k.startswith("diffusion_model.time_embed") for k in model.patches)
    name = type(model.model.model_config).__name__
    return Facts(families.presets_of(variant_of(model)), name, (*files, *told), distilled)


def prepare(model, run: Run, size: tuple[int, int], graph: Graph) -> Ready:
    """``run``'s preset on ``model`` for a picture of ``size`` pixels (width, height). Raises ValueError in words."""
    files = files_of(model, graph)
    match = choose(run.preset, facts_of(model, [file for file, _ in files]))
    row = match.preset
    steps = run.steps or (0 if row.fixed else match.steps) or row.steps
    plan = schedules.plan(row, steps, run.denoise)
    ready = model_sampling.patched(model, row, size)
    if row.omega is not None and model.get_attachment(model_sampling.OMEGA) is None:
        ready = model_sampling.lcm_guidance(ready, _guidance_file(row, files), row.omega)
    sigmas = model_sampling.sigmas_of(plan, ready, size)
    if plan.from_noise:
        ready = model_sampling.from_noise(ready, float(sigmas[0]))
    cfg = row.cfg_for(steps)
    return Ready(ready, model_sampling.sampler_of(row), sigmas, cfg, row, _words(match, steps, sigmas))


def _guidance_file(row: Preset, files: list[tuple[File, str | None]]) -> str:
    for file, path in files:
        if path is not None and file.keys:
            return path
    raise ValueError(
        f"preset {row.id} needs the guidance embedding of a full LCM, which this model's file does not hold: load the "
        "diffusers-format UNet file, connect LCM Guidance before this node, or choose the preset of the LCM-LoRA"
    )


def _words(match: Match, steps: int, sigmas: torch.Tensor) -> str:
    row, file = match.preset, match.file
    lines = [f"preset {row.id}: {match.why}", presets.summary(row, steps)]
    lines.append("sigmas: " + ", ".join(f"{s:.4g}" for s in sigmas.tolist()))
    if file is not None and file.strength is not None and row.lora and file.strength != row.lora_strength:
        lines.append(f"note: {file.name} is applied at {file.strength:g}; it is made for {row.lora_strength:g}")
    if row.guidance is not None:
        lines.append(
            f"guidance {row.guidance:g} belongs into the conditioning (FluxGuidance); the sampler node adds it"
        )
    return "\n".join([*lines, f"source: {row.source}"])


def sample(model, conditioning: tuple, latent: dict, run: Run, graph: Graph) -> tuple[dict, str]:
    """(LATENT, what was done) of a run through ComfyUI's SamplerCustom. ``conditioning``: (positive, negative)."""
    fixed = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    )
    ratio = model.get_model_object("latent_format").spacial_downscale_ratio
    ready = prepare(model, run, (fixed.shape[-1] * ratio, fixed.shape[-2] * ratio), graph)
    say(ready.text, graph.node)
    positive, negative = conditioning
    if ready.preset.guidance is not None:
        positive = [[text, {"guidance": ready.preset.guidance, **extra}] for text, extra in positive]
    out = SamplerCustom.execute(
        ready.model, True, run.seed, ready.cfg, positive, negative, ready.sampler, ready.sigmas, latent
    )
    return out.result[0], ready.text


def say(text: str, node: str | None) -> None:
    """Shows ``text`` on the running node, where there is a server to show it."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node is not None:
        server.send_progress_text(encodable(text), node)


def from_timesteps(model, grid: str, timesteps: str, steps: int, strength: float):
    """(MODEL, SIGMAS) for timesteps of a VP model; the MODEL starts from pure noise where strength is 1."""
    model_sampling.noise_table(model.get_model_object("model_sampling"))
    if grid == LCM_GRID:
        chosen = schedules.consistency_grid(steps, strength)
    elif grid == TRAILING:
        chosen = schedules.trailing(schedules.total_of(steps, strength))[-steps:]
    else:
        chosen = schedules.last_part(schedules.parse_timesteps(timesteps), strength)
    sigmas = model_sampling.sigmas_of(schedules.Plan(len(chosen), timesteps=chosen), model, (0, 0))
    return (model_sampling.from_noise(model, float(sigmas[0])) if strength == 1.0 else model), sigmas
