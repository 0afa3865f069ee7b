"""Quantizes a float checkpoint to a 4-bit file in ComfyUI's contract, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..quant.modules import quantize_weight
from ..quant.packing import tiles_fit
from ..quant.policy import LayerPlan, plan
from ..quant.schemes import KEEP, SVDQUANT
from . import save
from .errors import CheckpointError
from .formats import comfy_quant
from .source import FLOATS, Source

Progress = Callable[[int, int, str], None]  # done, total, what


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
        """One line: how many layers, and the bytes before and after."""
        before, after = sum(x.before for x in self.layers), sum(x.after for x in self.layers)
        share = f", their weights {after / before:.2f}x of 16 bits" if before else ""
        size = f"{self.source_bytes / 2**20:.1f} MiB -> {self.file_bytes / 2**20:.1f} MiB"
        return f"{self.family}: {len(self.layers)} layers in 4 bits{share}; file {size}"


def plan_source(source: Source, rank: int) -> dict[str, LayerPlan]:
    """The plan of every linear of the source's model, by its name below the prefix. Raises CheckpointError for none."""
    plans = plan(model_layers(source.shapes, source.prefix), source.family.rules, rank)
    if all(p.scheme == KEEP for p in plans.values()):
        name, reason = next(((n, p.reason) for n, p in plans.items() if "multiple" in p.reason), ("", "no linear fits"))
        raise CheckpointError(
            source.name, f"nothing can be quantized ({reason})", "4-bit layers need K % 64 == 0", name
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


def quantize(
    source: Source,
    out: str | Path,
    rank: int = 32,
    seed: int = 0,
    tiled: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Conversion:
    """Data-free 4-bit file ``out`` of an open ``source`` by its family's policy.

    ``tiled``: kitchen's tile-packed order where N % 128 == 0. Never overwrites; raises CheckpointError naming the
    layer.
    """
    plans = plan_source(source, rank)
    dtype, shrink = side_dtype(source)
    tensors: dict[str, Tensor] = {}
    done: list[Converted] = []
    total = len(source.shapes)
    for i, name in enumerate(source):
        if progress is not None:
            progress(i, total, name)
        layer = name[len(source.prefix) :].rsplit(".", 1)[0] if name.startswith(source.prefix) else ""
        layer_plan = plans.get(layer)
        quantized = layer_plan is not None and layer_plan.scheme != KEEP
        if quantized and name.endswith(".bias"):
            continue  # goes with its weight
        if quantized and name.endswith(".weight"):
            full = name.removesuffix(".weight")
            stored, row = _quantize_layer(source, full, layer_plan, dtype, seed, tiled, device)
            tensors |= stored
            done.append(row)
            continue
        value = source.get(name)
        tensors[name] = value.to(dtype) if shrink and value.dtype in (torch.float32, torch.float64) else value
    info = {k: v for k, v in source.metadata.items() if k.startswith("modelspec.")}
    info |= save.record(
        scheme=" + ".join(sorted({row.plan.scheme for row in done})),
        rank=rank,
        group_size=SVDQUANT.group_size,
        family=source.family.id,
        source_sha256=save.sha256(source.files),
        calibration={"method": "data_free", "seed": seed},
        layers=len(done),
    )
    path = save.save(out, tensors, info)
    before = sum(f.stat().st_size for f in source.files)
    return Conversion(path, source.family.title, tuple(done), before, path.stat().st_size)


def _quantize_layer(source: Source, full: str, layer_plan: LayerPlan, dtype, seed: int, tiled: bool, device: str):
    weight = source.get(f"{full}.weight").to(device)
    bias = source.get(f"{full}.bias").to(device) if f"{full}.bias" in source.shapes else None
    try:
        q = quantize_weight(weight, bias, layer_plan, dtype, seed)
    except ValueError as e:
        raise CheckpointError(source.name, str(e), "Repair the checkpoint, or keep this layer in 16 bits", full) from e
    tile = tiled and layer_plan.scheme == SVDQUANT.id and tiles_fit(*weight.shape)
    stored = comfy_quant.write(full, q.weight, tile)
    after = sum(t.numel() * t.element_size() for t in stored.values())
    if q.bias is not None:
        stored[f"{full}.bias"] = q.bias.to(dtype)
    return stored, Converted(full, layer_plan, q.error, 2 * weight.numel(), after)
