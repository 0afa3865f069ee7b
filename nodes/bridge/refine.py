"""Makes better 4-bit MODELs: LoftQ, which starts a LoRA with a base, and refinement against the 16-bit teacher."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import torch

from ...calibration.run import plans_of
from ...checkpoints.convert import side_of
from ...checkpoints.formats.stored import StoredLayer
from ...checkpoints.save import record, require_free, save
from ...quant import kernels, svdquant
from ...quant.checks import naming
from ...quant.schemes import KEEP, SVDQUANT
from ...training import loftq as initial
from ...training import refine as core
from ...training.chart import loss_chart
from ...training.loop import Watch
from ...training.recipes import LoftQ, Refine
from ...writing.room import check_room
from . import calibrate, outputs, selfcheck, train_model
from .build import assemble, dense_state, make_room, weight_of
from .calibrate import Inputs, tell
from .distill import conditions, latents
from .load import wrapped
from .save import RECORD_OF_FILE, RECORD_OF_MODEL
from .training import Live


def loftq(model, row: LoftQ, out: Path, node_id: str | None = None):
    """(4-bit MODEL, the same with the LoRA, report). Writes the LoRA to ``out``. Raises ValueError in one sentence for
    a model that is 4-bit already or has nothing to quantize, or a disk without room.
    """
    selfcheck.require()
    require_free(out)
    calibrate.refuse_quantized(
        model.model.diffusion_model, "LoftQ needs the weights before that: connect the 16-bit original"
    )
    whole = calibrate.Settings("data_free", SVDQUANT.id, row.base_rank, 0, 2, 1.0, 0)
    family = calibrate.family_of(model.model.diffusion_model)
    plans = plans_of(calibrate.shapes_of(model.model.diffusion_model), family, whole)
    plans = {n: p for n, p in plans.items() if p.scheme != KEEP}
    dtype, device = side_of(model.model.diffusion_model.dtype, family), mm.get_torch_device()
    layers = {n: m for n, m in model.model.diffusion_model.named_modules() if n in plans}
    check_room(out, sum(row.rank * sum(m.weight.shape) * dtype.itemsize for m in layers.values()))
    most = max(initial.working_bytes(*m.weight.shape) for m in layers.values())
    bar, done, biases = comfy.utils.ProgressBar(len(plans), node_id=node_id), {}, {}
    for name, plan in plans.items():
        stop = mm.throw_exception_if_processing_interrupted
        stop()
        make_room(most, device)
        weight = weight_of(model, f"{name}.weight").to(device)
        with naming(name):
            done[name] = initial.solve(weight, plan, row.rank, dtype, row.rounds, stop).to("cpu")
        biases[name] = _bias(model, name, done[name].weight)
        tell(node_id, f"{len(done)} of {len(plans)}: {name}, error {done[name].error:.4f}")
        bar.update_absolute(len(done), len(plans))
    base = with_weights(model, {n: x.weight for n, x in done.items()}, biases, dtype)
    state = _lora(done)
    info = {"modelspec.title": out.stem, "nibble_loftq": json.dumps({**asdict(row), "family": family.id})}
    note = outputs.save(out, lambda path: save(path, state, info | record(method="loftq")))
    base.attachments[RECORD_OF_MODEL] = record(scheme=SVDQUANT.id, calibration={"method": "loftq", **asdict(row)})
    both, _ = comfy.sd.load_lora_for_models(base, None, state, 1.0, 0.0)
    return base, both, outputs.with_notes(initial.table(done), [note])


def _bias(model, name: str, weight) -> torch.Tensor | None:
    bias = weight_of(model, f"{name}.bias")
    return svdquant.stored_bias(weight, bias) if isinstance(weight, svdquant.SVDQuantWeight) else bias


def _lora(done: dict[str, initial.Initialised]) -> dict[str, torch.Tensor]:
    out = {}
    for name, x in done.items():
        stem = f"diffusion_model.{name}"
        out |= {f"{stem}.lora_down.weight": x.down.cpu(), f"{stem}.lora_up.weight": x.up.cpu()}
        out[f"{stem}.alpha"] = torch.tensor(float(x.down.shape[0]))
    return out


def with_weights(model, weights: dict, biases: dict, dtype: torch.dtype):
    """A new MODEL of ``model``'s kind: ``weights`` (plain, by layer) with their stored ``biases`` in place, every other
    4-bit layer as it is.
    """
    module = model.model.diffusion_model
    kept = {n: m for n, m in module.named_modules() if kernels.is_ours(getattr(m, "weight", None)) and n not in weights}
    state = dense_state(model, {*weights, *kept})
    layers = {n: StoredLayer(w.to(dtype)) for n, w in weights.items()}
    layers |= {n: StoredLayer(kernels.unwrap(m.weight.detach())) for n, m in kept.items()}
    held = {**biases, **{n: m.bias for n, m in kept.items()}}
    state |= {f"{n}.bias": b.detach().to(dtype) for n, b in held.items() if b is not None}
    return assemble(model, state | wrapped(layers))


def refine(models: tuple, inputs: Inputs, row: Refine, node_id: str | None = None):
    """(new 4-bit MODEL, report, PIL chart). ``models``: (4-bit MODEL, 16-bit teacher); neither is changed.

    Raises ValueError in one sentence for a model without svdquant_w4a4 layers, or with LoRAs on it.
    """
    selfcheck.require()
    model, teacher = models
    if model.patches:
        raise ValueError("LoRAs are applied to the 4-bit model. Refine it without them, and apply them afterwards")
    target = train_model.resident(model)
    live = Live(target, row.updates, node_id)
    made = _states(teacher, inputs, row, live)
    mm.load_models_gpu([target], force_full_load=True)
    with train_model.learning(target):
        prompts = conditions(target, inputs.pairs, latents(target, inputs.latent)[0])
        base = live.seen(train_model.base_of(target))
        done = core.run(base, prompts, made, row, Watch(live.step, live.check))
    module = target.model.diffusion_model
    biases = {n: comfy.utils.get_attr(module, n).bias for n in done.weights}
    refined = with_weights(target, done.weights, biases, next(iter(done.weights.values())).wscales.dtype)
    old = model.get_attachment(RECORD_OF_MODEL) or model.get_attachment(RECORD_OF_FILE) or {}
    refined.attachments[RECORD_OF_MODEL] = done.about(old, row)
    return refined, done.text, loss_chart(done.losses, "output error")


def _states(teacher, inputs: Inputs, row: Refine, live: Live) -> core.States:
    """The teacher's trajectories. It may leave the device afterwards."""
    shape, _ = latents(teacher, inputs.latent)
    target = train_model.resident(teacher)
    mm.load_models_gpu([target], force_full_load=True)
    with train_model.learning(target):
        prompts = conditions(target, inputs.pairs, shape)
        return core.ask(train_model.base_of(target), prompts, shape, row, live.tell)
