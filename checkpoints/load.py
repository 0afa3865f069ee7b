"""Reads 4-bit checkpoints into plain tensors, in native names: dense ones, and each 4-bit layer as one value."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from . import folder, header, lazy, marks, native
from .errors import CheckpointError
from .formats import FORMATS, comfy_quant, gguf, nunchaku
from .formats.stored import StoredLayer

# Where a diffusion model's layers may stand in a file: ComfyUI's prefixes, longest first, and none.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "model.", "net.", "")


@dataclass(frozen=True)
class Checkpoint:
    """``dense``: every tensor that is not part of a 4-bit layer of ours; ``layers``: those, by full layer name."""

    name: str
    dense: dict[str, Tensor]
    layers: dict[str, StoredLayer]
    metadata: Mapping[str, str]


def needs_reader(path: str | Path) -> bool:
    """Whether ``path`` must go through `load`: it is packed, in other names, or not one safetensors file.

    Everything else is ComfyUI's to read. Raises CheckpointError for what is no model file.
    """
    path = Path(path)
    if gguf.is_gguf(path) or path.is_dir():
        return True
    names = header.read(path).tensors
    return len(folder.files(path)) > 1 or any(f.detect(names) for f in FORMATS if f is not comfy_quant)


def load(path: str | Path) -> Checkpoint:
    """The checkpoint at ``path``: a file, a folder, or one file of a folder that belongs together.

    Raises CheckpointError, see `parse` and `header.read`.
    """
    path = Path(path)
    if gguf.is_gguf(path):
        layers, dense, metadata = gguf.load(path)
        shapes = {f"{n}.weight": layer.weight.shape for n, layer in layers.items()}
        names = native.naming(shapes | {n: tuple(t.shape) for n, t in dense.items()}, {}, path.name)
        native.to_native(layers, dense, names, path.name)
        return Checkpoint(path.name, dense, layers, metadata)
    with lazy.opened(path) as (name, tensors, metadata):
        return parse(tensors, metadata, name, folder.config(path))


def parse(
    tensors: MutableMapping[str, Tensor],
    metadata: Mapping[str, str] | None,
    name: str,
    config: Mapping | None = None,
    core: Collection[str] = comfy_quant.CORE,
) -> Checkpoint:
    """Splits ``tensors`` (consumed) into dense tensors and 4-bit layers. Raises CheckpointError naming the layer.

    Configurations that live only in ComfyUI's ``_quantization_metadata`` are taken as if each layer carried its own.
    ``config``: the config.json beside the file, which says who wrote a diffusers folder. ``core``: the formats that the
    ComfyUI in hand loads by itself.
    """
    metadata = dict(metadata or {})
    mark(tensors, metadata, name)
    found = marks.read(metadata, config, name)
    what = lazy.entries(tensors)
    marks.refuse(what, found, name)
    layers = take_layers(tensors, name, core, found.lite)
    dense = tensors if isinstance(tensors, dict) else {n: tensors.pop(n) for n in list(tensors)}
    if layers:  # a float model in a publisher's names is ComfyUI's to read
        names = native.naming({n: shape for n, (_, shape) in what.items()}, found.config, name)
        native.to_native(layers, dense, names, name)
    return Checkpoint(name, dense, layers, metadata)


def mark(tensors: MutableMapping[str, Tensor], metadata: Mapping[str, str], name: str) -> None:
    """Gives the layers that only the file's metadata describes entries of their own. Raises CheckpointError."""
    for layer, entry in marked_layers(file_level(metadata, name), tensors).items():
        key = layer + comfy_quant.SUFFIX
        if key not in tensors:
            tensors[key] = comfy_quant.encode_config(entry)


def take_layers(
    tensors: MutableMapping[str, Tensor], name: str, core: Collection[str] = comfy_quant.CORE, lite: bool = False
) -> dict[str, StoredLayer]:
    """Takes the 4-bit layers of every format out of ``tensors``, under the file's names. ``lite``: see `marks.Marks`.
    Raises CheckpointError.
    """
    layers: dict[str, StoredLayer] = {}
    options = {comfy_quant: (core,), nunchaku: (lite,)}
    for fmt in FORMATS:
        if fmt.detect(tensors):
            layers |= fmt.read(tensors, name, *options.get(fmt, ()))
    return layers


def file_level(metadata: Mapping[str, str], name: str) -> dict[str, dict]:
    """Layer -> JSON from ComfyUI's file-level metadata. Raises CheckpointError when it is not valid."""
    text = metadata.get("_quantization_metadata")
    if text is None:
        return {}
    try:
        layers = json.loads(text)["layers"]
        return {str(k): dict(v) for k, v in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(name, f"its _quantization_metadata is not valid ({e})", header.AGAIN) from e


def marked_layers(entries: Mapping[str, dict], names: Collection[str]) -> dict[str, dict]:
    """File-level ``entries`` by their layers' full names among the tensors ``names``: the metadata may name a model's
    layers without the prefix under which a checkpoint keeps them, or with one that the file lacks. Entries without a
    layer are left out, as ComfyUI leaves them out.
    """
    out = {}
    for layer, entry in entries.items():
        bare = next((layer.removeprefix(p) for p in PREFIXES if p and layer.startswith(p)), layer)
        full = next((n for n in (layer, *(p + bare for p in PREFIXES)) if f"{n}.weight" in names), None)
        if full is not None:
            out[full] = entry
    return out
