"""Distils a MODEL inside a workflow into a LoRA for few steps: conditions and latents in, the trainer, a file out."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import comfy.model_management as mm
import comfy.sample
import comfy.sd
import comfy.utils
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...checkpoints import resume
from ...checkpoints.save import record, save
from ...reading import textfile
from ...sampling import distilled
from ...training import distill as core
from ...training import lora, paths
from ...training.adapters import Adapters, linears
from ...training.chart import loss_chart
from ...training.consistency import Consistency
from ...training.denoise import Denoiser
from ...training.loop import Plan, Watch
from ...writing.room import check_room
from . import outputs, selfcheck, train_model
from .build import weight_of
from .calibrate import encode, split, tell
from .sampling import facts_of
from .training import STATES, Live


@dataclass(frozen=True)
class Settings:
    """What the node was set to."""

    mode: str
    updates: int
    batch: int
    rank: int
    rate: float
    cfg: float
    steps: int
    start: int
    pairs: int
    teacher_steps: int
    seed: int
    omega: float = 0.0

    def core(self, about: str, loss_scale: float) -> core.Settings:
        """The core's settings; omega is drawn within ``omega`` of the teacher's guidance minus 1."""
        plan = Plan(
            self.mode, self.updates, self.batch, self.rate, warmup=min(50, self.updates // 10), weight_decay=0.0,
            ema=0.95, seed=self.seed, loss_scale=loss_scale,
        )  # fmt: skip
        middle = max(0.0, self.cfg - 1)
        consistency = Consistency(omega=(max(0.0, middle - self.omega), middle + self.omega))
        return core.Settings(
            self.mode, plan, self.cfg, self.steps, self.start, self.pairs, self.teacher_steps, about, consistency
        )


@dataclass(frozen=True)
class Inputs:
    """``pairs``: (positive, negative) conditioning of each prompt; ``samples``: a LATENT's tensor, all zero when it
    only gives the size.
    """

    pairs: tuple
    samples: torch.Tensor


def prompts(clip, text: str, negative: str, positive, negative_cond) -> tuple:
    """The (positive, negative) conditionings that a node was given, either way. Raises ValueError for none."""
    if positive is not None:
        return split(positive, negative_cond)
    lines = textfile.lines(text)
    if clip is None or not lines:
        raise ValueError("Connect CLIP and write prompts, one a line, or connect positive")
    return encode(clip, lines, negative)


def distill(models: tuple, inputs: Inputs, settings: Settings, out: Path, node_id: str | None = None):
    """(MODEL with the LoRA, report, PIL chart). ``models``: (MODEL, teacher or None for the model itself). ``out``: the
    LoRA file to write.

    A stopped run's pairs and state are kept under output/ until the same run ends. Raises ValueError in one sentence
    for inputs that do not fit the way, or a disk without room. Where ``out`` cannot be written in the end, see
    `outputs.save`.
    """
    selfcheck.require()
    model, other = models
    size = lora.file_bytes(model.model.diffusion_model, settings.rank)
    check_room(out, size)
    student = train_model.resident(model)
    teacher = None if other is None else train_model.resident(other)
    loaded = [m for m in (student, teacher) if m is not None]
    mm.load_models_gpu(loaded, force_full_load=True)
    chosen = settings.core(_signature(models, inputs, settings), train_model.loss_scale(student))
    what = f"Distill to Few Steps, {settings.mode}, {settings.updates} updates"
    live = Live(student, settings.updates, node_id)
    with ExitStack() as stack:
        kept = stack.enter_context(outputs.unfinished_run(chosen.about, what, _kept_bytes(size, inputs, settings)))
        for m in loaded:
            stack.enter_context(train_model.learning(m))
        module = student.model.diffusion_model
        adapters = Adapters(module, lora.usual(list(linears(module))), settings.rank, seed=settings.seed)
        adapters.to(student.load_device)
        stack.enter_context(adapters.attached(live.check))
        task = _task(live.seen(train_model.denoiser(student)), (student, teacher), adapters, inputs)
        result = core.run(task, chosen, kept.folder, Watch(live.step, live.check), _teller(node_id, live))
        state, info = adapters.state_dict(), _metadata(settings, model, out.stem)
        note = outputs.save(out, lambda path: save(path, state, info), result.kept)
        kept.finish()
    trained, _ = comfy.sd.load_lora_for_models(model, None, state, 1.0, 0.0)
    trained.set_attachments("lora_metadata", info)  # so that Few-Step Sampler knows it
    said = outputs.with_notes(report(settings, result, len(adapters.factors)), [note, *result.notes, *kept.notes])
    return trained, said, loss_chart(result.losses, "loss")


def _kept_bytes(size: int, inputs: Inputs, settings: Settings) -> int:
    """What an unfinished run keeps at most. ``size``: of the LoRA; f-, its moving average, has a state, too."""
    pairs = (settings.pairs + core.EXTRA) * inputs.samples[0].numel() * 2
    return pairs + 2 * STATES * size


def conditions(model, pairs: tuple, shape: tuple[int, ...]) -> tuple[list, object]:
    """(one condition a prompt, the first prompt's negative one) for latents of ``shape``."""
    like = torch.zeros(shape)
    found = [train_model.condition(model, positive, like) for positive, _ in pairs]
    return found, train_model.condition(model, pairs[0][1], like)


def latents(model, samples: torch.Tensor) -> tuple[tuple[int, ...], torch.Tensor | None]:
    """(shape of one latent, the pictures as the model has them or None for an empty latent)."""
    empty = not bool(samples.any())
    samples = train_model.clean(comfy.sample.fix_empty_latent_channels(model, samples))
    if samples.dim() != 4:
        raise ValueError("This model makes videos, and only models of pictures are trained here")
    pictures = None if empty else model.model.process_latent_in(samples.clone().float()).cpu()
    return tuple(samples.shape[1:]), pictures


def _task(seen: Denoiser, models: tuple, adapters: Adapters, inputs: Inputs) -> core.Task:
    (student, teacher), (answer, path) = models, paths.view(seen)

    def without(*args):
        with adapters.off():
            return answer(*args)

    guide = without if teacher is None else paths.view(train_model.denoiser(teacher))[0]
    shape, pictures = latents(student, inputs.samples)
    cond, empty = conditions(student, inputs.pairs, shape)
    return core.Task(answer, guide, adapters.parameters(), path, cond, empty, shape, pictures, student.load_device)


def _teller(node_id: str | None, live: Live):
    def say(what: str, done: int, total: int) -> None:
        live.check()
        tell(node_id, f"{what}: {done} of {total}")

    return say


def fingerprint(model) -> str:
    """Of a MODEL's linears as they are, codes where they are quantized, and of its patches."""
    weights = {}
    for name in linears(model.model.diffusion_model):
        weight = comfy.utils.get_attr(model.model.diffusion_model, f"{name}.weight")
        ours = isinstance(weight, QuantizedTensor)
        weights[name] = weight._qdata if ours else weight_of(model, f"{name}.weight")
    strengths = {str(key): [p[0] for p in value] for key, value in model.patches.items()}
    return resume.digest(weights=resume.fingerprint(weights), patches=strengths)


def _signature(models: tuple, inputs: Inputs, settings: Settings) -> str:
    """Changes with anything the result depends on."""
    conds = {"latent": inputs.samples}
    for i, pair in enumerate(inputs.pairs):
        for side, cond in zip(("positive", "negative"), pair, strict=True):
            conds |= {f"{i}.{side}.{j}": entry[0] for j, entry in enumerate(cond)}
    bases = [None if m is None else fingerprint(m) for m in models]
    return resume.signature(bases=bases, inputs=resume.fingerprint(conds), settings=asdict(settings))


def _metadata(settings: Settings, model, title: str) -> dict[str, str]:
    """What the LoRA file says of itself: how it was made, on what, and how it is sampled."""
    middle = max(0.0, settings.cfg - 1)
    omega = [max(0.0, middle - settings.omega), middle + settings.omega]
    details = {**asdict(settings), "omega": omega, "base_sha256": fingerprint(model)}
    details["sampling"] = distilled.words(settings.mode, settings.steps)
    sampled = distilled.record(settings.mode, settings.steps, facts_of(model, []).family)
    about = record(method=f"distill {settings.mode}", **sampled)
    return {"modelspec.title": title, distilled.KEY: json.dumps(details, sort_keys=True), **about}


def report(settings: Settings, outcome: core.Outcome, layers: int) -> str:
    """Markdown for a person."""
    what = "consistency loss" if settings.mode == "lcf" else "distance to the teacher's pictures"
    change = outcome.after / outcome.before - 1 if outcome.before else 0.0
    return "\n".join([
        f"| way | {settings.mode}: {core.MODES[settings.mode].summary} |",
        "|---|---|",
        f"| sample with | {distilled.words(settings.mode, settings.steps)} |",
        f"| updates | {len(outcome.losses)} of {settings.batch} pictures, rate {settings.rate:g} |",
        f"| layers | {layers}, rank {settings.rank} |",
        f"| {what} | {outcome.before:.5f} -> {outcome.after:.5f} ({change:+.1%}) |",
        f"| time of training | {outcome.seconds:.0f} s |",
    ])  # fmt: skip


__all__ = ["Inputs", "Settings", "conditions", "distill", "fingerprint", "latents", "prompts", "report"]
