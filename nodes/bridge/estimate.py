"""What estimates need from ComfyUI: a model's exact bytes, its class to simulate, and this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.utils
import torch

from ... import families
from ...checkpoints import forms
from ...checkpoints.inspect import headers, inspect
from ...profiling import calibrate, memory, weights, work
from ...profiling import estimate as core
from ...profiling.cards import ARCHITECTURES, CARDS
from ...profiling.estimate import Task
from ...profiling.tables import size
from ...profiling.timeline import stacked
from ...quant import kernels
from ...quant import machine as engines
from ...quant.policy import plan
from ...quant.schemes import SCHEMES
from .. import files
from . import demo_unet, load, measured, model_profile, records, reports, simulate
from .operations import operations

FOLDERS = ("diffusion_models", "checkpoints")
HERE = "this one"
FOUR_BIT = {*SCHEMES, *kernels.OURS.values(), kernels.LOW_RANK}
TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.")
VAE = ("first_stage_model.", "vae.")
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}
CARD_DTYPE = torch.bfloat16  # what diffusion models compute in on the table's cards

__all__ = ["Models", "Task", "choices", "fingerprint", "gpu_choices", "precision_choices", "run"]


@dataclass(frozen=True)
class Models:
    """What was given: a file's choice or 'none', and connected models or None."""

    file: str
    model: object = None
    clip: object = None
    vae: object = None


@dataclass(frozen=True)
class Entry:
    """A tensor as `weights.split` wants it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Subject:
    """The model asked about: its weights, ComfyUI's description of it, and the dtype it computes in here."""

    weights: weights.Weights
    base: object  # comfy.model_base.BaseModel, real or on the meta device
    family: str
    dtype: torch.dtype


def choices() -> list[str]:
    return [records.NONE, *(f"{folder}/{n}" for folder in FOLDERS for n in files.names(folder))]


def precision_choices() -> list[str]:
    return [weights.STORED, *weights.precisions(SCHEMES)]


def gpu_choices() -> list[str]:
    return [HERE, *CARDS]


def fingerprint(file: str) -> str:
    """Changes with the model's file, and with what was measured on this machine."""
    own = files.fingerprint(*file.split("/", 1)) if "/" in file else records.NONE
    return f"{own} {records.measured()}"


def run(task: Task, gpu: str, models: Models) -> tuple[str, str, torch.Tensor]:
    """(markdown, JSON, chart) of the estimate. Raises ValueError when no model, or two, are given."""
    if (models.model is None) == (models.file == records.NONE):
        raise ValueError("Will it Fit: connect a model or choose a file, one of the two")
    precisions = weights.precisions(SCHEMES)
    subject = from_model(models.model) if models.model is not None else from_file(models.file)
    here = gpu == HERE
    if not here and gpu not in CARDS:
        raise ValueError(f"{gpu!r} is not a card of the table. Choose one from the list")
    machine = memory.probe(comfy.model_management.get_torch_device()).device
    on_cards = known(subject, task, models, CARD_DTYPE, "")
    asked = known(subject, task, models, subject.dtype, machine.name) if here else on_cards
    answer = core.estimate(task, asked, precisions, gpu=not here or machine.kind == "cuda")
    table = core.fit_table(task, on_cards, precisions)
    limit = machine.limit if here else CARDS[gpu].nbytes
    text = core.markdown(answer, asked, machine.name if here else gpu, limit, table)
    text += "".join(f"\n\n{line}." for line in forms.advice([task.precision], machine_of(gpu)))
    return text, core.to_json(answer, asked), reports.image(chart(task, on_cards, precisions, limit))


def machine_of(gpu: str) -> engines.Machine:
    """The machine that was asked about. A card of the table is taken for one with all that its kernels need."""
    if gpu == HERE:
        return engines.here()
    architecture = ARCHITECTURES[CARDS[gpu].architecture]
    if not architecture.compute:
        return engines.Machine(engines.AMD, gpu, arch=architecture.gfx)
    return engines.Machine(engines.NVIDIA, gpu, architecture.compute[0], cuda=(engines.KITCHENS_CUDA,))


def chart(task: Task, known_: core.Known, precisions, limit: int):
    """Memory by part for every precision, on a card."""
    rows = []
    for id in precisions:
        e = core.estimate(core.with_precision(task, id), known_, precisions)
        parts = [("weights", e.weights), ("LoRA", e.lora), ("activations", e.activation), ("driver", e.context)]
        rows.append((id, parts, size(sum(n for _, n in parts))))
    return stacked(f"Memory while sampling (line: {size(limit)})", rows, limit)


def known(subject: Subject, task: Task, models: Models, dtype: torch.dtype, device: str) -> core.Known:
    """Everything to estimate ``task`` from. ``device``: where constants must have been measured; "" for a card that
    nobody measured.
    """
    kind = model_profile.attention_kind() if device else work.FUSED
    simulated, activation, how = None, 0, ""
    factor = simulate.factor(subject.base)
    latent = (task.rows, 0, task.height // factor, task.width // factor)
    if simulate.knows(subject.base):
        simulated = simulate.evaluation(subject.base, latent, dtype, kind)
    else:
        activation = int(subject.base.memory_required([task.rows, 4, *latent[2:]]))
        how = f"what ComfyUI reserves for it: {type(subject.base.diffusion_model).__name__} cannot be simulated"
    constants, found = None, "not measured: nobody ran this pack's calibration on that card"
    if device:
        name = str(dtype).removeprefix("torch.")
        stored = "4-bit" if core.is_4bit(task, subject.weights, weights.precisions(SCHEMES)) else "16-bit"
        key = calibrate.Key("comfyui", subject.family, name, kind, stored, device)
        constants, found = calibrate.find(measured.rows(key, subject.base), key)
    w = subject.weights
    text = model_profile.module_bytes(models.clip.cond_stage_model) if models.clip is not None else w.text
    vae, decoding = w.vae, 0
    if models.vae is not None:
        vae = model_profile.module_bytes(models.vae.first_stage_model)
        shape = (task.batch, models.vae.latent_channels, *latent[2:])
        decoding = int(models.vae.memory_used_decode(shape, models.vae.vae_dtype))
    w = weights.Weights(**{**w.__dict__, "text": text, "vae": vae})
    return core.Known(w, simulated, constants, found, activation, how, decoding)


def from_model(patcher) -> Subject:
    """The connected MODEL, its patches' tensors included where they are in its weights."""
    base = patcher.model
    module = base.diffusion_model
    family = model_profile.family(module)
    tensors = {n: _entry(t) for n, t in module.state_dict().items()}
    layers, shapes = {}, {}
    for name, m in work.linears(module):
        if isinstance(getattr(m, "weight", None), torch.Tensor):
            n, k = m.weight.shape
            shapes[name] = (n, k)
            side = sum(tensors[t].nbytes for t in tensors if t.rpartition(".")[0] == name and not t.endswith(
                (".bias", weights.DESCRIPTION)))  # fmt: skip
            layers[name] = (n, k, side, kernels.format_of(getattr(m.weight, "_layout_cls", None)) or weights.KEEP)
    plans = plan(shapes, family.rules, 0)
    w = weights.split(tensors, layers, plans, name="the connected model", family=family.title)
    return Subject(w, base, family.id, base.get_dtype_inference())


def _entry(t: torch.Tensor) -> Entry:
    return Entry(DTYPES.get(t.dtype, "other"), tuple(t.shape), t.numel() * t.element_size())


def from_file(choice: str) -> Subject:
    """A model file, from its header; tensors are only mapped, for ComfyUI's detection. Raises CheckpointError."""
    path = files.listed_path(choice, FOLDERS)
    head, found = headers(Path(path))[1], inspect(path)  # of all its files, where it is one shard
    p = found.prefix
    family = families.by_id(found.family_id)
    layers = {r.layer: (r.n, r.k, r.nbytes, r.scheme if r.scheme in FOUR_BIT else weights.KEEP) for r in found.rows}
    plans = plan({r.layer: (r.n, r.k) for r in found.rows}, family.rules, 0)
    text, vae = (sum(e.nbytes for n, e in head.tensors.items() if n.startswith(start)) for start in (TEXT, VAE))
    own = {n.removeprefix(p): e for n, e in head.tensors.items() if n.startswith(p) and not n.startswith(TEXT + VAE)}
    w = weights.split(own, layers, plans, name=found.name, family=family.title, text=text, vae=vae)
    base, dtype = empty_base(path, p)
    return Subject(w, base, family.id, dtype)


def empty_base(path: str, prefix: str):
    """(ComfyUI's BaseModel of a file, without its weights, and the dtype it would compute in here). The demo's UNet,
    which ComfyUI's detection does not know, is small enough to build as it is.
    """
    checkpoint = load.read(path)
    quantized = bool(checkpoint.layers)
    sd = {**checkpoint.dense, **load.wrapped(checkpoint.layers)}
    sd = {name.removeprefix(prefix): t for name, t in sd.items() if name.startswith(prefix)}
    if demo_unet.is_demo(sd):
        base = demo_unet.build(sd, operations if quantized else None).model
        return base, base.get_dtype_inference()
    load.model_options(sd, "", checkpoint.name)  # raises in one sentence for a model that ComfyUI does not know
    detect = comfy.model_detection
    config = detect.model_config_from_unet(sd, "") or detect.model_config_from_diffusers_unet(sd)
    management = comfy.model_management
    device, dtypes = management.get_torch_device(), config.supported_inference_dtypes
    count = comfy.utils.calculate_parameters(sd)
    dtype = management.unet_dtype(model_params=count, supported_dtypes=list(dtypes))
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, dtypes))
    base = config.get_model(sd, "", device="meta")
    return base, base.get_dtype_inference()
