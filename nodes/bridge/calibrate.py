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
from ...calibration import report
from ...calibration import run as runs
from ...calibration.run import Settings, Subject
from ...checkpoints.convert import side_of
from ...checkpoints.save import fingerprint
from ...quant import kernels
from ...quant.calib import engine
from ...quant.calib.engine import Layer, Watch
from ...quant.calib.presets import preset as preset_row
from ...reading.names import encodable
from . import outputs, selfcheck, train_model
from .build import kept_dtype, make_room, weight_of, with_layers
from .save import RECORD_OF_FILE, RECORD_OF_MODEL

FLOW = (comfy.model_base.ModelType.FLOW, comfy.model_base.ModelType.FLUX)


@dataclass(frozen=True)
class Inputs:
    """What is sampled: (positive, negative) conditionings, one pair a prompt, from ``latent``: its
    size counts, and where one distils the pictures in it.
    """

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
    _refuse(model, model.model.diffusion_model)
    subject = subject_of(model, inputs, settings, node_id)

    def build(layers: dict[str, Layer], about: dict[str, str], _store):
        out = with_layers(model, layers, subject.dtype)
        out.attachments[RECORD_OF_MODEL] = (model.get_attachment(RECORD_OF_FILE) or {}) | about
        return out

    watch = Watch(Progress(node_id).layer, comfy.model_management.throw_exception_if_processing_interrupted)
    done = runs.calibrate(subject, settings, folder, build, watch)
    tell(node_id, report.summary(done.layers, settings.preset))
    said = outputs.with_notes(report.table(done.layers, settings.preset), done.notes)
    chart = report.chart(done.layers, f"{subject.family.title}: relative output error by layer")
    return done.made, done.layers, said, chart


def subject_of(model, inputs: Inputs, settings: Settings, node_id: str | None = None) -> Subject:
    """``model`` as a calibration sees it: patches merged, its own samples."""
    module, device = model.model.diffusion_model, comfy.model_management.get_torch_device()
    shapes, state, family, row = shapes_of(module), _state(module), family_of(module), preset_row(settings.preset)

    def weight(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        make_room(engine.working_bytes(*shapes[name], row), device)
        return weight_of(model, f"{name}.weight"), weight_of(model, f"{name}.bias")

    return Subject(
        family=family,
        module=module,
        shapes=shapes,
        nbytes={n: v.numel() * _itemsize(v) for n, v in state.items()},
        dtype=side_of(module.dtype, family),
        weight=weight,
        sample=lambda: _sample(model, inputs, settings, node_id),
        prompts=len(inputs.pairs),
        drawn=[fingerprint(of_conditions(inputs.pairs)), list(inputs.latent.shape)],
        device=str(device),
    )


def _itemsize(value: torch.Tensor) -> int:
    return (kept_dtype(value) if value.is_floating_point() else value.dtype).itemsize


def of_conditions(pairs: tuple) -> dict[str, torch.Tensor]:
    """The encoded texts of (positive, negative) pairs, each under a name of its own."""
    return {
        f"{i}.{side}.{j}": entry[0]
        for i, pair in enumerate(pairs)
        for side, cond in zip(("positive", "negative"), pair, strict=True)
        for j, entry in enumerate(cond)
    }


def family_of(module) -> families.FamilySpec:
    names = {k: tuple(v.shape) for k, v in _state(module).items()}
    return families.detect(names | {f"{n}.weight": s for n, s in shapes_of(module).items()})[0]


def shapes_of(module) -> dict[str, tuple[int, int]]:
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


class Progress:
    """The node's bar, and a line of text: which layer, how far off, how long still."""

    def __init__(self, node_id: str | None):
        self.node_id, self.start = node_id, time.monotonic()
        self.bar = comfy.utils.ProgressBar(1, node_id=node_id)

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
