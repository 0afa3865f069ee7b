"""Calibrates a MODEL inside a workflow: samples prompts, solves layer after layer, builds a new MODEL."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.sample
import comfy.utils
import torch
from comfy_kitchen.tensor import QuantizedTensor
from server import PromptServer

from ... import families
from ...checkpoints import resume
from ...checkpoints.lazy import Asked
from ...checkpoints.save import record
from ...quant import kernels
from ...quant.calib import allocate, engine, report
from ...quant.calib.engine import Job, Layer, Watch
from ...quant.calib.presets import preset as preset_row
from ...quant.policy import LayerPlan, plan, retarget
from ...quant.schemes import KEEP
from ...reading.names import encodable
from ...writing import unfinished
from . import outputs, selfcheck, train_model
from .build import make_room, weight_of, with_layers

FLOW = (comfy.model_base.ModelType.FLOW, comfy.model_base.ModelType.FLUX)


@dataclass(frozen=True)
class Settings:
    """What the node was set to. ``budget``: bytes of the whole diffusion model, 0 for none."""

    preset: str
    target: str
    rank: int
    budget: int
    levels: int
    cfg: float
    seed: int


@dataclass(frozen=True)
class Inputs:
    """What is sampled: (positive, negative) conditionings, one pair a prompt, from ``latent`` (its size counts)."""

    pairs: tuple
    latent: torch.Tensor


def encode(clip, prompts: list[str], negative: str) -> tuple:
    """(positive, negative) conditioning of each prompt."""
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(negative))
    return tuple((clip.encode_from_tokens_scheduled(clip.tokenize(p)), empty) for p in prompts)


def split(positive, negative) -> tuple:
    """A CONDITIONING's entries as single prompts: what Conditioning (Combine) put together."""
    fallback = [negative[0]] if negative else None
    return tuple(([entry], fallback or [entry]) for entry in positive)


def calibrate(model, inputs: Inputs, settings: Settings, folder: Path, node_id: str | None = None):
    """(new MODEL, {layer: solved}, markdown report, PIL chart). ``folder``: where unfinished runs are kept.

    Raises ValueError in one sentence for a model that is 4-bit already, compiled, or has nothing to quantize.
    """
    selfcheck.require()
    module = model.model.diffusion_model
    _refuse(model, module)
    plans, family = plans_of(model, settings)
    dtype = _side_dtype(model)
    row = preset_row(settings.preset)
    if row.needs_data and not inputs.pairs:
        raise ValueError(f"Preset {row.id} needs prompts to sample: connect CLIP and write some, or connect positive")
    shapes, device = _shapes(module), comfy.model_management.get_torch_device()

    def weight(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        make_room(engine.working_bytes(*shapes[name], row), device)
        return weight_of(model, f"{name}.weight"), weight_of(model, f"{name}.bias")

    job = Job(
        plans={n: p for n, p in plans.items() if p.scheme != KEEP},
        preset=row,
        dtype=dtype,
        run=lambda: _sample(model, inputs, settings, node_id),
        weight=weight,
        device=str(device),
        seed=settings.seed,
        fit=settings.budget - _other_bytes(model, plans) if settings.budget else None,
    )
    progress = Progress(node_id, len(job.plans))
    signature, what = _signature(model, inputs, settings, plans), f"Calibrate to 4-bit, {family}"
    with unfinished.run(folder, signature, what, engine.solved_bytes(shapes, job.plans)) as kept:
        store = None if kept.folder is None else resume.Folder(kept.folder)
        watch = Watch(progress.layer, comfy.model_management.throw_exception_if_processing_interrupted, store)
        layers = engine.calibrate(module, job, watch)
        out = with_layers(model, layers, dtype)
        out.attachments["nibble_record"] = _record(settings, inputs, layers, family)
        kept.finish()
    tell(node_id, report.summary(layers, row.id))
    said = outputs.with_notes(report.table(layers, row.id), [*(store.notes() if store else ()), *kept.notes])
    return out, layers, said, report.chart(layers, f"{family}: relative output error by layer")


def plans_of(model, settings: Settings) -> tuple[dict[str, LayerPlan], str]:
    """(plan of every linear by its native name, family title)."""
    module = model.model.diffusion_model
    shapes = _shapes(module)
    names = {k: tuple(v.shape) for k, v in _state(module).items()} | {f"{n}.weight": s for n, s in shapes.items()}
    family, _ = families.detect(names)
    plans = retarget(plan(shapes, family.rules, settings.rank), shapes, settings.target)
    if all(p.scheme == KEEP for p in plans.values()):
        raise ValueError("Nothing in this model can be quantized: no linear layer has a width that is a multiple of 64")
    return plans, family.title


def _shapes(module) -> dict[str, tuple[int, int]]:
    return {n: (m.out_features, m.in_features) for n, m in module.named_modules() if hasattr(m, "in_features")}


def _state(module) -> dict[str, torch.Tensor]:
    """The state's tensors: a module may keep something else in it (``_extra_state``)."""
    return {k: v for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}


def refuse_quantized(module, remedy: str) -> None:
    """Raises ValueError for a model that is quantized already. Scaled fp8 counts as 16 bits: it is read as numbers."""
    for name, m in module.named_modules():
        weight = getattr(m, "weight", None)
        if kernels.is_ours(weight):
            raise ValueError(f"This model is 4-bit already. {remedy}")
        if isinstance(weight, QuantizedTensor) and "FP8" not in weight._layout_cls:
            fmt = getattr(m, "quant_format", None) or weight._layout_cls
            raise ValueError(f"This model is quantized already (layer {name}: {fmt}). {remedy}")
        if isinstance(weight, torch.Tensor) and not weight.is_floating_point():
            raise ValueError(f"This model is quantized already (layer {name}: its weight is {weight.dtype}). {remedy}")


def _refuse(model, module) -> None:
    refuse_quantized(module, "Calibrate the 16-bit original")
    if hasattr(module, "_orig_mod") or "torch.compile" in model.object_patches:
        raise ValueError("This model is compiled, and calibration must see its layers. Put TorchCompileModel after it")


def _side_dtype(model) -> torch.dtype:
    """16-bit as the model is; the family of number formats that a 32-bit model would sample in otherwise."""
    dtype = model.model.diffusion_model.dtype
    if dtype in (torch.float16, torch.bfloat16):
        return dtype
    return next(d for d in [*model.model.model_config.supported_inference_dtypes, torch.bfloat16] if d.itemsize == 2)


def _other_bytes(model, plans: dict[str, LayerPlan]) -> int:
    """Bytes in a file of everything that is not a planned layer's weight, as the model holds it, and its header."""
    planned = {f"{n}.weight" for n, p in plans.items() if p.scheme != KEEP}
    state = _state(model.model.diffusion_model)
    rest = [v.numel() * v.element_size() for k, v in state.items() if k not in planned]
    return sum(rest) + allocate.file_overhead(len(planned), len(rest))


def _sample(model, inputs: Inputs, settings: Settings, node_id: str | None) -> None:
    """Draws all prompts. No kernel that takes more than a linear is used: hooks must see what each layer is fed."""
    scheduler = "simple" if model.model.model_type in FLOW else "normal"
    for i, (positive, negative) in enumerate(inputs.pairs):
        tell(node_id, f"watching prompt {i + 1} of {len(inputs.pairs)}")
        latent = comfy.sample.fix_empty_latent_channels(model, inputs.latent)
        seed = settings.seed + i
        noise = comfy.sample.prepare_noise(latent, seed)
        with train_model.unfused():
            comfy.sample.sample(
                model, noise, settings.levels, settings.cfg, "euler", scheduler, positive, negative, latent,
                disable_pbar=True, seed=seed,
            )  # fmt: skip


def _signature(model, inputs: Inputs, settings: Settings, plans: dict[str, LayerPlan]) -> str:
    planned = [n for n, p in plans.items() if p.scheme != KEEP]
    weights = Asked(planned, lambda n: weight_of(model, f"{n}.weight"))
    conds = {}
    for i, pair in enumerate(inputs.pairs):
        for side, cond in zip(("positive", "negative"), pair, strict=True):
            conds |= {f"{i}.{side}.{j}": entry[0] for j, entry in enumerate(cond)}
    return resume.signature(
        weights=resume.fingerprint(weights), conds=resume.fingerprint(conds), settings=vars(settings),
        latent=list(inputs.latent.shape), plans={n: [p.scheme, p.rank, p.act_unsigned] for n, p in plans.items()},
        method=engine.METHOD,
    )  # fmt: skip


def _record(settings: Settings, inputs: Inputs, layers: dict[str, Layer], family: str) -> dict[str, str]:
    """What a saved file says of itself."""
    t = report.totals(layers)
    calibration = {
        "method": settings.preset, "seed": settings.seed, "prompts": len(inputs.pairs), "levels": settings.levels,
        "cfg": settings.cfg, "kept_calibrated": t["calibrated"], "unsigned": t["unsigned"], "error": t["error"],
        "unreached": len(report.unreached(layers, settings.preset)),
    }  # fmt: skip
    schemes = sorted({x.plan.scheme for x in layers.values()} - {KEEP})
    return record(
        scheme=" + ".join(schemes),
        rank=settings.rank,
        group_size=64,
        family=family,
        layers=len(layers),
        calibration=calibration,
    )


class Progress:
    """The node's bar, and a line of text: which layer, how far off, how long still."""

    def __init__(self, node_id: str | None, total: int):
        self.node_id, self.start = node_id, time.monotonic()
        self.bar = comfy.utils.ProgressBar(total, node_id=node_id)

    def layer(self, layer: Layer, done: int, total: int) -> None:
        spent = time.monotonic() - self.start
        left = spent / max(1, done) * (total - done)
        error = f", error {layer.solved.error:.4f}" if layer.solved.error == layer.solved.error else ""
        tell(self.node_id, f"{done} of {total}: {layer.name}{error}, {left:.0f} s left")
        self.bar.update_absolute(done, total)


def tell(node_id: str | None, text: str) -> None:
    """Live text on the node; nothing without a browser."""
    if node_id is not None and PromptServer.instance is not None:
        PromptServer.instance.send_progress_text(encodable(text), node_id)
