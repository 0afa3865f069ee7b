"""Quantizes a float checkpoint to a 4-bit file in ComfyUI's contract, one layer in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ..quant import core_formats
from ..quant.calib.engine import Layer
from ..quant.checks import require_float
from ..quant.modules import quantize_weight
from ..quant.packing import tiles_fit
from ..quant.policy import LayerPlan, plan, retarget
from ..quant.schemes import KEEP, SVDQUANT
from ..quant.svdquant import SVDQuantWeight
from . import save
from .errors import CheckpointError
from .formats import comfy_quant, core_quant
from .quantized import SIDES
from .source import FLOATS, Source

Progress = Callable[[int, int, str], None]  # done, total, what
MOST_TENSORS = 6  # of a quantized layer, its bias among them
NAMES = ("comfy_quant", *SIDES)  # below a layer: what no float source may hold already


@dataclass(frozen=True)
class Converted:
    """What became of one layer: its plan, its relative weight error, and its bytes before and after."""

    name: str
    plan: LayerPlan
    error: float
    before: int
    after: int


@dataclass(frozen=True)
class Conversion:
    path: Path
    family: str
    layers: tuple[Converted, ...]
    source_bytes: int
    file_bytes: int

    def summary(self) -> str:
        """One line: how many layers in which schemes, and the bytes before and after."""
        counts = Counter("16 bits" if x.plan.scheme == KEEP else x.plan.scheme for x in self.layers).most_common()
        forms = ", ".join(f"{n}{' layers' * (i == 0)} in {form}" for i, (form, n) in enumerate(counts)) or "no layer"
        before, after = sum(x.before for x in self.layers), sum(x.after for x in self.layers)
        share = f", their weights {after / before:.2f}x of 16 bits" if before else ""
        size = f"{self.source_bytes / 2**20:.1f} MiB -> {self.file_bytes / 2**20:.1f} MiB"
        return f"{self.family}: {forms}{share}; file {size}"


def plan_source(source: Source, rank: int) -> dict[str, LayerPlan]:
    """The plan of every linear of the source's model, by its name below the prefix. Raises CheckpointError for none."""
    plans = plan(model_layers(source.shapes, source.prefix), source.family.rules, rank)
    if all(p.scheme == KEEP for p in plans.values()):
        name, reason = next(
            ((n, p.reason) for n, p in plans.items() if "does not fit" in p.reason), ("", "no linear fits")
        )
        raise CheckpointError(
            source.name, f"nothing can be quantized ({reason})", "4-bit layers need N % 8 == 0 and K % 64 == 0", name
        )
    return plans


def model_layers(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    """Layer name below ``prefix`` -> weight shape."""
    end = ".weight"
    return {n[len(prefix) : -len(end)]: s for n, s in shapes.items() if n.startswith(prefix) and n.endswith(end)}


def side_dtype(source: Source) -> tuple[torch.dtype, bool]:
    """(dtype of scales and low-rank factors, whether 32-bit tensors are stored in it): the model's own 16-bit type."""
    count = dict.fromkeys(FLOATS, 0)
    for name, dtype in source.dtypes.items():
        if dtype in FLOATS and name.startswith(source.prefix):
            count[dtype] += torch.Size(source.shapes[name]).numel()
    most = max(count, key=count.get)
    if most in ("F16", "BF16"):
        return {"F16": torch.float16, "BF16": torch.bfloat16}[most], False
    return getattr(torch, source.family.side_dtype), True


@dataclass(frozen=True)
class Options:
    """How to write. ``solved``: layers that calibration has done, by name below the source's prefix; the others are
    quantized data-free. ``calibration``: the record's entry on where ``solved`` came from. ``target``: a format of
    ComfyUI's own instead of svdquant_w4a4, see `quant.policy.retarget`.
    """

    rank: int = 32
    seed: int = 0
    tiled: bool = False
    device: str = "cpu"
    plans: Mapping[str, LayerPlan] | None = None
    solved: Mapping[str, Layer] = field(default_factory=dict)
    calibration: Mapping | None = None
    target: str = SVDQUANT.id


def quantize(
    source: Source, out: str | Path, options: Options | None = None, progress: Progress | None = None
) -> Conversion:
    """The 4-bit file ``out`` of an open ``source`` by its family's policy.

    Never overwrites; raises CheckpointError naming the layer that cannot be done.
    """
    save.require_free(out)
    options = options or Options()
    plans = options.plans or retarget(
        plan_source(source, options.rank), model_layers(source.shapes, source.prefix), options.target
    )
    check_names(source, plans)
    most = len(source.shapes) + MOST_TENSORS * sum(p.scheme != KEEP for p in plans.values())
    save.require_readable(Path(out).name, most, _kept_info(source), save.RECORD_ROOM)
    dtype, shrink = side_dtype(source)
    tensors: dict[str, Tensor] = {}
    done: list[Converted] = []
    for i, name in enumerate(source):
        if progress is not None:
            progress(i, len(source.shapes), name)
        inner = name[len(source.prefix) :] if name.startswith(source.prefix) else ""
        layer, _, end = inner.rpartition(".")
        quantized = layer in plans and plans[layer].scheme != KEEP and end in ("weight", "bias")
        if quantized and end == "weight":
            stored, row = _quantize_layer(source, layer, plans[layer], dtype, options)
            tensors |= stored
            done.append(row)
        elif not quantized:  # a quantized layer's bias goes with its weight
            value = source.get(name)
            tensors[name] = value.to(dtype) if shrink and value.dtype in (torch.float32, torch.float64) else value
    path = save.save(out, tensors, _info(source, options, done))
    before = sum(f.stat().st_size for f in source.files)
    return Conversion(path, source.family.title, tuple(done), before, path.stat().st_size)


def check_names(source: Source, plans: Mapping[str, LayerPlan]) -> None:
    """Raises CheckpointError for a tensor of the source that has a name which a 4-bit layer's tensors take."""
    for layer, layer_plan in plans.items():
        full = source.prefix + layer
        taken = next((n for n in NAMES if f"{full}.{n}" in source.shapes), None)
        if layer_plan.scheme != KEEP and taken is not None:
            what = f"the tensor {taken} beside its weight has a name that the 4-bit layer needs"
            raise CheckpointError(source.name, what, "Rename that tensor, or take it out", full)


def _kept_info(source: Source) -> dict[str, str]:
    return {k: v for k, v in source.metadata.items() if k.startswith("modelspec.")}


def _info(source: Source, options: Options, done: list[Converted]) -> dict[str, str]:
    return _kept_info(source) | save.record(
        scheme=" + ".join(sorted({row.plan.scheme for row in done})),
        rank=options.rank,
        group_size=SVDQUANT.group_size,
        family=source.family.id,
        source_sha256=save.sha256(source.files),
        calibration=dict(options.calibration or {"method": "data_free", "seed": options.seed}),
        layers=len(done),
    )


def _quantize_layer(source: Source, layer: str, layer_plan: LayerPlan, dtype: torch.dtype, options: Options):
    full = source.prefix + layer
    ready = options.solved.get(layer)
    if ready is not None:
        layer_plan, solved = ready.plan, ready.solved
        weight, bias, error = solved.weight, solved.bias, solved.error
    else:
        weight, bias, error = _data_free(source, full, layer_plan, dtype, options)
    n, k = weight.shape
    stored = stored_layer(full, weight, dtype, options.tiled)
    after = sum(t.numel() * t.element_size() for t in stored.values())
    if bias is not None:
        stored[f"{full}.bias"] = bias.to(dtype)
    return stored, Converted(layer, layer_plan, error, 2 * n * k, after)


def stored_layer(full: str, weight, dtype: torch.dtype, tiled: bool = False) -> dict[str, Tensor]:
    """The tensors of one solved layer, whatever it became: ours, a format of ComfyUI's, or 16 bits."""
    if isinstance(weight, QuantizedTensor):
        return core_quant.write(full, weight)
    if isinstance(weight, Tensor):
        return {f"{full}.weight": weight.to(dtype)}
    tiled = tiled and isinstance(weight, SVDQuantWeight) and tiles_fit(*weight.shape)
    return comfy_quant.write(full, weight.to(dtype), tiled)


def _data_free(source: Source, full: str, layer_plan: LayerPlan, dtype: torch.dtype, options: Options):
    weight = source.get(f"{full}.weight").to(options.device)
    bias = source.get(f"{full}.bias").to(options.device) if f"{full}.bias" in source.shapes else None
    try:
        require_float(weight)
        if layer_plan.scheme in core_formats.FORMATS:
            q = core_formats.quantize(weight, layer_plan.scheme, dtype)
            error = (q.dequantize().float() - weight.float()).norm() / weight.float().norm().clamp(min=1e-30)
            return q, bias, float(error)
        q = quantize_weight(weight, bias, layer_plan, dtype, options.seed)
    except ValueError as e:
        raise CheckpointError(source.name, str(e), "Repair the checkpoint, or keep this layer in 16 bits", full) from e
    return q.weight, q.bias, q.error
