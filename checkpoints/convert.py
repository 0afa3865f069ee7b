"""Quantizes a float checkpoint to a 4-bit file in ComfyUI's contract, one layer in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ..families.spec import FamilySpec
from ..quant.calib.engine import Layer
from ..quant.modules import blank, moved, quantize_weight
from ..quant.packing import tiles_fit
from ..quant.policy import LayerPlan, plan, retarget
from ..quant.schemes import KEEP, SVDQUANT
from ..quant.svdquant import SVDQuantWeight
from ..writing.room import check_room
from ..writing.tensors import Entry, entries, nbytes
from . import save
from .errors import CheckpointError, naming
from .formats import comfy_quant, core_quant
from .lazy import DTYPES
from .marks import SIDES
from .source import FLOATS, Source

Progress = Callable[[int, int, str], None]  # done, total, what
REPAIR = "Repair the checkpoint, or keep this layer in 16 bits"
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
    dtype = side_of(DTYPES[most], source.family)
    return dtype, dtype != DTYPES[most]


def side_of(dtype: torch.dtype, family: FamilySpec) -> torch.dtype:
    """The dtype of scales and low-rank factors beside weights of ``dtype``: the same if it has 16 bits."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else getattr(torch, family.side_dtype)


@dataclass(frozen=True)
class Options:
    """How to write. ``solved``: layers that calibration has done, by name below the source's prefix; the others are
    quantized data-free. ``kept``: reads one of those that are ``away``. ``about``: what the file says of ``solved``,
    see `described`. ``target``: a format of ComfyUI's own instead of svdquant_w4a4, see `quant.policy.retarget`.
    """

    rank: int = 32
    seed: int = 0
    tiled: bool = False
    device: str = "cpu"
    plans: Mapping[str, LayerPlan] | None = None
    solved: Mapping[str, Layer] = field(default_factory=dict)
    kept: Callable[[str], Layer] | None = None
    about: Mapping[str, str] | None = None
    target: str = SVDQUANT.id


def quantize(
    source: Source, out: str | Path, options: Options | None = None, progress: Progress | None = None
) -> Conversion:
    """The 4-bit file ``out`` of an open ``source`` by its family's policy.

    Never overwrites; raises CheckpointError naming the layer that cannot be done, WriteError where there is no room.
    """
    save.require_free(out)
    options = options or Options()
    plans = options.plans or retarget(
        plan_source(source, options.rank), model_layers(source.shapes, source.prefix), options.target
    )
    check_names(source, plans)
    kind = side_dtype(source)
    announced, plans = _announced(source, plans, kind, options)
    out = Path(out)
    save.require_readable(out.name, len(announced), save.kept_info(source.metadata), save.RECORD_ROOM)
    check_room(out, nbytes(announced))
    done: list[Converted] = []
    with save.writing(out, announced, _info(source, options, plans)) as file:
        for i, name in enumerate(source):
            if progress is not None:
                progress(i, len(source.shapes), name)
            layer, end = _part_of(source, name, plans)
            if layer is None:
                file.write(name, _passed(source.get(name), kind))
            elif end == "weight":  # its bias goes with it
                stored, row = _quantize_layer(source, layer, plans[layer], kind[0], options)
                for part in list(stored):
                    file.write(part, stored.pop(part))
                done.append(row)
    before = sum(f.stat().st_size for f in source.files)
    return Conversion(out, source.family.title, tuple(done), before, out.stat().st_size)


def _part_of(source: Source, name: str, plans: Mapping[str, LayerPlan]) -> tuple[str | None, str]:
    """(the layer in ``plans`` that the tensor ``name`` belongs to, weight or bias); (None, "") for what passes as it
    is.
    """
    inner = name[len(source.prefix) :] if name.startswith(source.prefix) else ""
    layer, _, end = inner.rpartition(".")
    return (layer, end) if layer in plans and end in ("weight", "bias") else (None, "")


def _passed(value: Tensor, kind: tuple[torch.dtype, bool]) -> Tensor:
    """What becomes of a tensor that is no part of a 4-bit layer. ``kind``: see `side_dtype`."""
    dtype, shrink = kind
    return value.to(dtype) if shrink and value.dtype in (torch.float32, torch.float64) else value


def _announced(
    source: Source, plans: Mapping[str, LayerPlan], kind: tuple[torch.dtype, bool], options: Options
) -> tuple[dict[str, Entry], dict[str, LayerPlan]]:
    """(every tensor of the file, the plan that each 4-bit layer in it gets), before anything is read or solved."""
    final = {n: options.solved[n].plan if n in options.solved else p for n, p in plans.items() if p.scheme != KEEP}
    found, layers = {}, {}
    for name, shape in source.shapes.items():
        layer, end = _part_of(source, name, final)
        if layer is None:
            found[name] = _passed(torch.empty(shape, dtype=source.dtype(name), device="meta"), kind)
        elif end == "weight":
            layers[layer] = final[layer]
            found |= _blank_layer(source, layer, final[layer], kind[0], options)
    return entries(found), layers


def _blank_layer(source: Source, layer: str, layer_plan: LayerPlan, dtype: torch.dtype, options: Options):
    """What `_quantize_layer` stores, without values."""
    full = source.prefix + layer
    ready = options.solved.get(layer)
    if ready is not None:
        weight, bias = moved(ready.solved.weight, "meta"), ready.solved.bias
    else:
        name, bias = f"{full}.bias", None
        if name in source.shapes:
            bias = torch.empty(source.shapes[name], dtype=source.dtype(name), device="meta")
        with naming(source.name, REPAIR, full, (ValueError,)):
            weight, bias = blank(source.shapes[f"{full}.weight"], bias, layer_plan, dtype)
    return _stored(full, weight, bias, dtype, options.tiled)


def check_names(source: Source, plans: Mapping[str, LayerPlan]) -> None:
    """Raises CheckpointError for a tensor of the source that has a name which a 4-bit layer's tensors take."""
    for layer, layer_plan in plans.items():
        full = source.prefix + layer
        taken = next((n for n in NAMES if f"{full}.{n}" in source.shapes), None)
        if layer_plan.scheme != KEEP and taken is not None:
            what = f"the tensor {taken} beside its weight has a name that the 4-bit layer needs"
            raise CheckpointError(source.name, what, "Rename that tensor, or take it out", full)


def _info(source: Source, options: Options, plans: Mapping[str, LayerPlan]) -> dict[str, str]:
    """``plans``: of every layer that is quantized."""
    method = {"method": "data_free", "seed": options.seed}
    about = dict(options.about or described(plans, options.rank, source.family, method))
    return save.kept_info(source.metadata) | save.extended(about, source_sha256=save.sha256(source.files))


def described(plans: Mapping[str, LayerPlan], rank: int, family: FamilySpec, method: Mapping) -> dict[str, str]:
    """The record of a quantized model. ``plans``: of every layer that is no longer what it was; ``method``: how."""
    return save.record(
        scheme=" + ".join(sorted({p.scheme for p in plans.values()} - {KEEP})),
        rank=rank,
        group_size=SVDQUANT.group_size,
        family=family.id,
        calibration=dict(method),
        layers=len(plans),
    )


def _quantize_layer(source: Source, layer: str, layer_plan: LayerPlan, dtype: torch.dtype, options: Options):
    full = source.prefix + layer
    ready = options.solved.get(layer)
    if ready is not None:
        done = (options.kept(layer) if ready.away else ready).solved
    else:
        done = _data_free(source, full, layer_plan, dtype, options)
    n, k = done.weight.shape
    stored = _stored(full, done.weight, done.bias, dtype, options.tiled)
    after = nbytes(entries({n: t for n, t in stored.items() if n != f"{full}.bias"}))
    return stored, Converted(layer, layer_plan, done.error, 2 * n * k, after)


def _stored(full: str, weight, bias: Tensor | None, dtype: torch.dtype, tiled: bool) -> dict[str, Tensor]:
    return stored_layer(full, weight, dtype, tiled) | ({} if bias is None else {f"{full}.bias": bias.to(dtype)})


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
    with naming(source.name, REPAIR, full, (ValueError,)):
        return quantize_weight(weight, bias, layer_plan, dtype, options.seed)
