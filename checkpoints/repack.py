"""Rewrites any file that this pack reads in ComfyUI's per-layer contract, from file to file: codes stay, only their
order and names change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import families
from ..quant import parts
from ..quant.modules import blank, quantize_weight
from ..quant.nvfp4_lowrank import NVFP4LowRankWeight
from ..quant.packing import tiles_fit
from ..quant.policy import LayerPlan, plan
from ..quant.schemes import KEEP
from ..quant.svdquant import SVDQuantWeight
from ..quant.weight_only import WeightOnly
from ..writing.room import check_room
from ..writing.tensors import Entry, entries, nbytes
from . import folder, header, lazy, logical, marks, pieces, save
from .convert import NAMES
from .errors import CheckpointError, naming
from .formats import comfy_quant, gguf
from .formats.stored import StoredLayer
from .load import Checkpoint

Progress = Callable[[int, int, str], None]  # done, total, what
RENAME = "Rename that tensor, or take it out"
OTHERS = (WeightOnly, NVFP4LowRankWeight)  # what ``requantize`` is about: they have no int4 kernel


@dataclass(frozen=True)
class Options:
    """``requantize``: make int4 of GGUF, bitsandbytes and nvfp4 layers, by the family's policy; they are kept else."""

    requantize: bool = False
    rank: int = 32
    seed: int = 0
    tiled: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Repacked:
    path: Path
    family: str
    forms: dict[str, int]  # form -> layers
    formats: dict[str, int]  # what they became -> layers
    requantized: int
    source_bytes: int
    file_bytes: int

    def summary(self) -> str:
        """What came of it, in two lines."""
        was = ", ".join(f"{n} {form}" for form, n in sorted(self.forms.items())) or "no 4-bit layer"
        now = ", ".join(f"{n} {form}" for form, n in sorted(self.formats.items())) or "none"
        kept = sum(self.forms.values()) - self.requantized
        size = f"{self.source_bytes / 2**20:.1f} MiB -> {self.file_bytes / 2**20:.1f} MiB"
        again = f", {self.requantized} requantized" if self.requantized else ""
        return f"{self.family}: {was} -> {now}; {size}\n{kept} layers kept their codes{again}"


def repack(
    path: str | Path, out: str | Path, options: Options | None = None, progress: Progress | None = None
) -> Repacked:
    """The file ``out`` of the model at ``path``. Never overwrites; raises CheckpointError naming the layer, WriteError
    where there is no room.
    """
    options, path, out = options or Options(), Path(path), Path(out)
    save.require_free(out)
    with pieces.opened(path) as model:
        outline = model.outline
        _check(outline, path.name)
        family, prefix = families.detect(_shapes(outline, path.name))
        plans = _plans(outline.layers, family, prefix, options)
        named = _namer(path)
        announced, formats = _announced(outline, plans, options)
        announced = {named(n): entry for n, entry in announced.items()}
        check_room(out, nbytes(announced))
        forms, total = Counter(layer.form for layer in outline.layers.values()), len(outline.layers)
        done = 0
        with save.writing(out, announced, _info(path, family, forms, formats, len(plans))) as file:
            for piece in model:
                for name in list(piece.layers):
                    if progress is not None:
                        progress(done, total, name)
                    done += 1
                    layer = piece.layers.pop(name)
                    with naming(path.name, "Convert it without requantizing", name, (ValueError,)):
                        piece.dense.update(_stored(name, layer, piece.dense, plans.get(name), options, _requantized))
                    del layer
                for name in list(piece.dense):
                    file.write(named(name), piece.dense.pop(name))
    before = sum(f.stat().st_size for f in folder.files(path))
    return Repacked(out, family.title, dict(forms), dict(formats), len(plans), before, out.stat().st_size)


def _announced(
    outline: Checkpoint, plans: Mapping[str, LayerPlan], options: Options
) -> tuple[dict[str, Entry], Counter]:
    """(every tensor of the file, what its layers become), before any layer is read."""
    found, formats = dict(outline.dense), Counter()
    for name, layer in outline.layers.items():
        stored = _stored(name, layer, found, plans.get(name), options, _bare)
        formats[comfy_quant.decode_config(stored[f"{name}.comfy_quant"], outline.name, name)["format"]] += 1
        taken = next((n for n in stored if n in found and n != f"{name}.bias"), None)
        if taken is not None:
            raise CheckpointError(outline.name, f"the tensor {taken} has a name that it needs", RENAME, name)
        found |= stored
    return entries(found), formats


def _stored(
    name: str,
    layer: StoredLayer,
    tensors: Mapping[str, Tensor],
    how: LayerPlan | None,
    options: Options,
    again: Callable,
) -> dict[str, Tensor]:
    """The tensors of a layer, and its bias where that changes. ``again``: makes it int4 where ``how`` says so."""
    bias = None
    if how is not None:
        layer, bias = again(name, layer, tensors.get(f"{name}.bias"), how, options)
    tiled = (options.tiled or layer.tiled) and isinstance(layer.weight, SVDQuantWeight)
    stored = comfy_quant.write(name, layer.weight, tiled and tiles_fit(*layer.weight.shape))
    return stored | ({} if bias is None else {f"{name}.bias": bias})


def _check(checkpoint: Checkpoint, name: str) -> None:
    """Raises CheckpointError where there is nothing to convert, or a name is taken."""
    if not checkpoint.layers and not comfy_quant.detect(checkpoint.dense):
        what = lazy.entries(checkpoint.dense)
        found = marks.first_quantized(what, {}, lambda _layer: "comfy_quant")
        if found is None:
            raise CheckpointError(name, "it has no 4-bit layer", "Quantize it with nibble quantize instead")
        remedy = "Convert or quantize another file of the model: its 16-bit original, or one made for ComfyUI"
        raise CheckpointError(name, f"it has no 4-bit layer that can be converted ({found[1]})", remedy, found[0])
    for layer in checkpoint.layers:
        taken = next((n for n in ("weight", *NAMES) if f"{layer}.{n}" in checkpoint.dense), None)
        if taken is not None:
            what = f"the tensor {taken} beside it has a name that the converted layer needs"
            raise CheckpointError(name, what, RENAME, layer)


def _namer(path: Path) -> Callable[[str], str]:
    """What a tensor is called in the file: a source of one layer without a name gets that back."""
    if gguf.is_gguf(path):
        return str
    found = header.names(n for f in folder.files(path) for n in header.read(f).tensors)
    alone = all(k != v for k, v in found.items())
    return lambda name: name.removeprefix(f"{header.ALONE}.") if alone else name


def _shapes(checkpoint: Checkpoint, name: str) -> dict[str, tuple[int, ...]]:
    """Logical shapes, those of layers in ComfyUI's own formats among them."""
    dense = {n: header.Entry(dtype, shape) for n, (dtype, shape) in lazy.entries(checkpoint.dense).items()}
    end = comfy_quant.SUFFIX
    marked = {n.removesuffix(end): t for n, t in checkpoint.dense.items() if n.endswith(end)}
    configs = {layer: comfy_quant.decode_config(t, name, layer) for layer, t in marked.items()}
    ours = {f"{n}.weight": x.weight.shape for n, x in checkpoint.layers.items()}
    return logical.shapes(dense, configs) | ours


def _info(path: Path, family, forms: Counter, formats: Counter, again: int) -> dict[str, str]:
    """The record. Nothing of the source's own metadata but what this pack understands: it may hold anything."""
    return save.record(
        scheme=" + ".join(sorted(formats)),
        family=family.id,
        layers=sum(formats.values()),
        converted_from=dict(sorted(forms.items())),
        requantized=again,
        source_sha256=save.sha256(folder.files(path)),
    )


def _plans(layers: dict[str, StoredLayer], family, prefix: str, options: Options) -> dict[str, LayerPlan]:
    """Which layers are made int4, and how."""
    if not options.requantize:
        return {}
    shapes = {n[len(prefix) :]: x.weight.shape for n, x in layers.items() if isinstance(x.weight, OTHERS)}
    found = plan(shapes, family.rules, options.rank)
    return {prefix + n: p for n, p in found.items() if p.scheme != KEEP}


def _requantized(name: str, layer: StoredLayer, bias: Tensor | None, how: LayerPlan, options: Options):
    """(layer, bias) rounded again from the dense weight."""
    weight = parts.dequantize(layer.weight).to(options.device)
    done = quantize_weight(weight, bias, how, _side_dtype(bias), options.seed)
    return StoredLayer(done.weight, form=layer.form), done.bias


def _bare(name: str, layer: StoredLayer, bias: Tensor | None, how: LayerPlan, options: Options):
    """What `_requantized` gives, without values."""
    weight, bias = blank(layer.weight.shape, bias, how, _side_dtype(bias))
    return StoredLayer(weight, form=layer.form), bias


def _side_dtype(bias: Tensor | None) -> torch.dtype:
    return torch.bfloat16 if bias is None or bias.dtype not in (torch.float16, torch.bfloat16) else bias.dtype
