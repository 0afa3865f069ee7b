"""Makes better 4-bit MODELs: LoftQ, which starts a LoRA with a base, and refinement against the 16-bit teacher."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import torch

from ...checkpoints.formats.stored import StoredLayer
from ...checkpoints.save import RECORD, record, require_free, save
from ...quant import kernels, svdquant
from ...quant.checks import naming
from ...quant.schemes import KEEP, SVDQUANT
from ...training import loftq as initial
from ...training import paths
from ...training import refine as core
from ...training.chart import loss_chart
from ...training.loop import Plan, Watch, train
from ...training.tuned import Tuner
from ...writing.room import check_room
from . import calibrate, outputs, selfcheck, train_model
from .build import assemble, dense_state, make_room, weight_of
from .calibrate import tell
from .distill import Inputs, conditions, latents
from .load import wrapped
from .training import Live


@dataclass(frozen=True)
class Start:
    """LoftQ's settings: rank of the LoRA, of the base's own branch, rounds."""

    rank: int
    base_rank: int
    rounds: int


@dataclass(frozen=True)
class Settings:
    """Refinement's settings. ``stops``: states of each prompt's trajectory; ``cfg``: as the model is sampled."""

    updates: int
    batch: int
    rate: float
    stops: int
    cfg: float
    seed: int


def loftq(model, settings: Start, out: Path, node_id: str | None = None):
    """(4-bit MODEL, the same with the LoRA, report). Writes the LoRA to ``out``. Raises ValueError in one sentence for
    a model that is 4-bit already or has nothing to quantize, or a disk without room.
    """
    selfcheck.require()
    require_free(out)
    calibrate.refuse_quantized(
        model.model.diffusion_model, "LoftQ needs the weights before that: connect the 16-bit original"
    )
    whole = calibrate.Settings("data_free", SVDQUANT.id, settings.base_rank, 0, 2, 1.0, 0)
    plans, family = calibrate.plans_of(model, whole)
    plans = {n: p for n, p in plans.items() if p.scheme != KEEP}
    dtype, device = side_dtype(model), mm.get_torch_device()
    layers = {n: m for n, m in model.model.diffusion_model.named_modules() if n in plans}
    check_room(out, sum(settings.rank * sum(m.weight.shape) * dtype.itemsize for m in layers.values()))
    most = max(initial.working_bytes(*m.weight.shape) for m in layers.values())
    bar, done, biases = comfy.utils.ProgressBar(len(plans), node_id=node_id), {}, {}
    for name, plan in plans.items():
        stop = mm.throw_exception_if_processing_interrupted
        stop()
        make_room(most, device)
        weight = weight_of(model, f"{name}.weight").to(device)
        with naming(name):
            done[name] = initial.solve(weight, plan, settings.rank, dtype, settings.rounds, stop).to("cpu")
        biases[name] = _bias(model, name, done[name].weight)
        tell(node_id, f"{len(done)} of {len(plans)}: {name}, error {done[name].error:.4f}")
        bar.update_absolute(len(done), len(plans))
    base = with_weights(model, {n: x.weight for n, x in done.items()}, biases, dtype)
    state = _lora(done)
    info = {"modelspec.title": out.stem, "nibble_loftq": json.dumps({**asdict(settings), "family": family})}
    note = outputs.save(out, lambda path: save(path, state, info | record(method="loftq")))
    base.attachments["nibble_record"] = record(scheme=SVDQUANT.id, calibration={"method": "loftq", **asdict(settings)})
    both, _ = comfy.sd.load_lora_for_models(base, None, state, 1.0, 0.0)
    return base, both, outputs.with_notes(initial.table(done), [note])


def side_dtype(model) -> torch.dtype:
    """16-bit as the model is, bfloat16 for others."""
    dtype = model.model.diffusion_model.dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


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


def refine(models: tuple, inputs: Inputs, settings: Settings, node_id: str | None = None):
    """(new 4-bit MODEL, report, PIL chart). ``models``: (4-bit MODEL, 16-bit teacher); neither is changed.

    Raises ValueError in one sentence for a model without svdquant_w4a4 layers, or with LoRAs on it.
    """
    selfcheck.require()
    model, teacher = models
    if model.patches:
        raise ValueError("LoRAs are applied to the 4-bit model. Refine it without them, and apply them afterwards")
    made, target = _states(teacher, inputs, settings, node_id), train_model.resident(model)
    mm.load_models_gpu([target], force_full_load=True)
    live = Live(target, settings.updates, node_id)
    with ExitStack() as stack:
        stack.enter_context(train_model.learning(target))
        answer, path = paths.view(live.seen(train_model.denoiser(target)))
        prompts = conditions(target, inputs.pairs, latents(target, inputs.samples)[0])
        tuner = Tuner(target.model.diffusion_model)
        stack.enter_context(tuner.attached(live.check))
        learn, held = (core.of_prompts(made, rows) for rows in core.split(inputs.pairs))
        check = held if len(held) else learn
        before = core.measure(answer, path, prompts, check, target.load_device)
        plan = Plan(
            "refine", settings.updates, settings.batch, settings.rate, warmup=min(20, settings.updates // 10),
            weight_decay=0.0, ema=0.95, seed=settings.seed, loss_scale=train_model.loss_scale(target),
        )  # fmt: skip
        loss = core.objective(answer, path, prompts, learn, (settings.batch, target.load_device))
        result = train(plan, tuner.parameters(), loss, None, Watch(live.step, live.check))
        after = core.measure(answer, path, prompts, check, target.load_device)
        weights = tuner.weights()
    module = target.model.diffusion_model
    biases = {n: comfy.utils.get_attr(module, n).bias for n in weights}
    refined = with_weights(target, weights, biases, next(iter(weights.values())).wscales.dtype)
    refined.attachments["nibble_record"] = _record(model, settings, before, after)
    where = "prompts held out" if len(held) else "the prompts trained on (fewer than four)"
    return refined, _report(len(weights), before, after, (where, result)), loss_chart(result.losses, "output error")


def _states(teacher, inputs: Inputs, settings: Settings, node_id: str | None) -> core.States:
    """The teacher's trajectories. It may leave the device afterwards."""
    shape, _ = latents(teacher, inputs.samples)
    target = train_model.resident(teacher)
    mm.load_models_gpu([target], force_full_load=True)

    def say(done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        tell(node_id, f"states of the teacher: {done} of {total}")

    with train_model.learning(target):
        answer, path = paths.view(train_model.denoiser(target))
        walk = core.Walk(shape, settings.stops, settings.cfg, settings.seed)
        return core.states(answer, path, conditions(target, inputs.pairs, shape), walk, target.load_device, say)


def _record(model, settings: Settings, before: float, after: float) -> dict[str, str]:
    """The model's own record with what was done to it."""
    old = json.loads(model.attachments.get("nibble_record", {}).get(RECORD, "{}"))
    refined = {**asdict(settings), "output_error": [before, after]}
    return record(**{"scheme": SVDQUANT.id, **{k: v for k, v in old.items() if k != "tool"}, "refined": refined})


def _report(layers: int, before: float, after: float, rest: tuple) -> str:
    where, result = rest
    return "\n".join([
        f"| layers tuned | {layers}: scales, zeros and low-rank factors; codes as they were |",
        "|---|---|",
        f"| output error, {where} | {before:.6f} -> {after:.6f} ({after / before - 1:+.1%}) |",
        f"| updates | {len(result.losses)} in {result.seconds:.0f} s |",
    ])  # fmt: skip
