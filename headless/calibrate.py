"""Calibrates a diffusers pipeline and writes the 4-bit file in native names: ``nibble quantize --preset fast``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from torch import Tensor

from ..checkpoints import resume
from ..checkpoints.convert import Conversion, Options, check_names, model_layers, plan_source, quantize, side_dtype
from ..checkpoints.errors import CheckpointError
from ..checkpoints.header import BYTES
from ..checkpoints.lazy import Asked
from ..checkpoints.save import require_free
from ..checkpoints.source import Source
from ..prompts import batch, calibration
from ..prompts import domain as domains
from ..quant.calib import allocate, report
from ..quant.calib.engine import METHOD, Job, Layer, Watch, calibrate, solved_bytes
from ..quant.calib.presets import Preset
from ..quant.policy import LayerPlan
from ..quant.schemes import KEEP
from ..writing import unfinished
from ..writing.room import check_room
from . import pipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What the pipeline draws while its layers are watched: every prompt once, in ``levels`` steps."""

    prompts: tuple[str, ...]
    levels: int = 8
    cfg: float = 3.0
    seed: int = 0

    def run(self, pipe, batch: int = 4) -> None:
        """Samples all prompts; the same passes every time."""
        for i in range(0, len(self.prompts), batch):
            pipeline.sample(pipe, list(self.prompts[i : i + batch]), self.levels, self.cfg, self.seed + i)


def texts(file: Path | None, domain: str | None, count: int, seed: int) -> tuple[str, ...]:
    """``count`` prompts of a text file, of a domain, or of the pack's own list."""
    if domain is not None:
        return tuple(p.positive for p in batch.unique(domains.load(domain), count, seed))
    return tuple(calibration.sample(count, seed, None if file is None else calibration.read(file)))


def pipeline_folder(given: Path, source: Source) -> Path:
    """The diffusers pipeline that ``given`` is or lies in. Raises CheckpointError for a file without one."""
    for folder in (given, given.parent):
        if (folder / "model_index.json").is_file():
            return folder
    remedy = (
        "Give the diffusers pipeline folder, calibrate in ComfyUI (the node Calibrate to 4-bit), or use "
        "--preset data_free"
    )
    raise CheckpointError(source.name, "calibration must run the model, and this is a file without a pipeline", remedy)


def module_layer(source: Source, native: str) -> str:
    """The diffusers layer whose input a native layer has: fused q, k and v all see what q sees."""
    rule = source.rules.get(f"{native}.weight")
    return native if rule is None else rule.sources[0].removesuffix(".weight")


def float_weight(source: Source, native: str) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of a native layer as the source has them."""
    bias = f"{source.prefix}{native}.bias"
    return source.get(f"{source.prefix}{native}.weight"), source.get(bias) if bias in source.shapes else None


def job(source: Source, pipe, inputs: Inputs, preset: Preset, options: Options, budget: int = 0) -> Job:
    """What to solve for this source and pipeline. ``budget``: bytes of the file, 0 for none."""
    plans = options.plans or plan_source(source, options.rank)
    dtype, _ = side_dtype(source)
    module = pipeline.denoiser(pipe)
    return Job(
        plans={n: p for n, p in plans.items() if p.scheme != KEEP},
        preset=preset,
        dtype=dtype,
        run=lambda: inputs.run(pipe),
        weight=lambda name: float_weight(source, name),
        place=lambda name: module_layer(source, name),
        device=str(module.device),
        seed=options.seed,
        fit=budget - _other_bytes(source, plans) if budget else None,
    )


def _other_bytes(source: Source, plans: Mapping[str, LayerPlan]) -> int:
    """Bytes in the file of everything that is not a planned layer's weight, its header among them."""
    planned = {f"{source.prefix}{n}.weight" for n, p in plans.items() if p.scheme != KEEP}
    _, shrink = side_dtype(source)
    sizes = {**BYTES, **({"F32": 2, "F64": 2} if shrink else {})}
    rest = [prod(source.shapes[n]) * sizes.get(source.dtypes[n], 8) for n in source if n not in planned]
    return sum(rest) + allocate.file_overhead(len(planned), len(rest))


def file_bytes(source: Source, plans: Mapping[str, LayerPlan]) -> int:
    """Bytes of the file that is written by ``plans``."""
    shapes = model_layers(source.shapes, source.prefix)
    planned = sum(allocate.stored_bytes(plan, shapes[n]) for n, plan in plans.items() if plan.scheme != KEEP)
    return planned + _other_bytes(source, plans)


def signature(source: Source, work: Job, inputs: Inputs) -> str:
    """Changes with anything the result depends on."""
    weights = Asked(work.plans, lambda n: work.weight(n)[0])
    plans = {n: [p.scheme, p.rank, p.act_unsigned] for n, p in work.plans.items()}
    drawn = [list(inputs.prompts), inputs.levels, inputs.cfg, inputs.seed, work.fit]
    values = dict(
        plans=plans, preset=work.preset.id, dtype=str(work.dtype), seed=work.seed, inputs=drawn, method=METHOD
    )
    return resume.signature(weights=resume.fingerprint(weights), **values)


def run(
    source: Source,
    pipe,
    inputs: Inputs,
    preset: Preset,
    options: Options,
    out: Path,
    budget: int = 0,
    say: Callable[[Layer, int, int], None] = lambda *_: None,
) -> tuple[Conversion, dict[str, Layer]]:
    """Calibrates and writes ``out``. Solved layers are kept beside it until then, so a stopped run goes on."""
    require_free(out)
    check_names(source, options.plans or plan_source(source, options.rank))
    work = job(source, pipe, inputs, preset, options, budget)
    check_room(out, file_bytes(source, options.plans or plan_source(source, options.rank)))
    need = solved_bytes(model_layers(source.shapes, source.prefix), work.plans)
    root = out.with_name(f".{out.name}.solved")
    with unfinished.run(root, signature(source, work, inputs), f"calibration of {source.name}", need) as kept:
        store = None if kept.folder is None else resume.Folder(kept.folder)
        layers = calibrate(pipeline.denoiser(pipe), work, Watch(layer=say, store=store), hold=False)
        record = {
            "method": preset.id, "seed": options.seed, "prompts": len(inputs.prompts), "levels": inputs.levels,
            "cfg": inputs.cfg, "prompts_sha256": resume.digest(prompts=list(inputs.prompts)),
            "kept_calibrated": sum(x.solved.calibrated for x in layers.values()),
            "unsigned": sum(x.plan.act_unsigned for x in layers.values()),
            "unreached": len(report.unreached(layers, preset.id)),
        }  # fmt: skip
        plans = options.plans or plan_source(source, options.rank)
        done = replace(options, solved=layers, kept=_reader(store, out), calibration=record, plans=plans)
        conversion = quantize(source, out, done)
        kept.finish()
    for note in [*(store.notes() if store else ()), *kept.notes]:
        log.warning(note)
    return conversion, layers


def _reader(store: resume.Folder | None, out: Path) -> Callable[[str], Layer]:
    """Reads back solved layers, which are not held in memory."""

    def read(name: str) -> Layer:
        layer = store.read(name)
        if layer is None:
            remedy = "Run it again: it goes on with the layers that can be read"
            raise CheckpointError(out.name, "what was solved of it cannot be read any more", remedy, name)
        return layer

    return read
