"""A 4-bit file of any form, read a piece at a time: what one place of the family joins or cuts, or one other layer.

What a piece becomes is known before any of them is read: `Pieces.outline` is the checkpoint without values, on torch's
meta device. Only what decides about a layer's form is read for it: what `DESCRIBES` it, and of layers that are joined
into one what they may have in common (`SHARED`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..families.spec import Place
from ..quant.parts import ROWS
from . import folder, lazy, load, marks, native
from .formats import bnb, comfy_quant, gguf
from .formats.stored import StoredLayer
from .load import Checkpoint

Layers, Dense = dict[str, StoredLayer], dict[str, Tensor]
DESCRIBES = ("comfy_quant", "quant_map", "wcscales", "wtscale")  # JSON, and scales that are multiplied with each other
SHARED = ("smooth", "smooth_factor", "weight_smooth_factor", "lora_down", "proj_down", "weight_proj_down")
PART = re.compile(r"(.+)\.parts\.\d+")


@dataclass(frozen=True)
class Pieces:
    """``outline``: the whole without values. ``take``: names of the file -> what they hold, under its own names.

    Going through it reads each piece when its turn comes; who takes the tensors out of a piece has one at a time.
    """

    outline: Checkpoint
    groups: list[tuple[tuple[Place, ...], list[str]]]
    naming: native.Naming | None
    take: Callable[[list[str]], tuple[Layers, Dense]]

    def __iter__(self) -> Iterator[Checkpoint]:
        """Every piece in native names. Raises CheckpointError naming the layer."""
        return (self._read(places, members) for places, members in self.groups)

    def _read(self, places: tuple[Place, ...], members: list[str]) -> Checkpoint:
        layers, dense = self.take(members)
        if places:
            naming = replace(self.naming, places=places, closed=False)
            native.to_native(layers, dense, naming, self.outline.name)
        return Checkpoint(self.outline.name, dense, layers, self.outline.metadata)


@contextmanager
def opened(path: str | Path) -> Iterator[Pieces]:
    """The pieces of what `load.load` reads as a whole, while the block lasts. Raises CheckpointError for the same."""
    path = Path(path)
    if gguf.is_gguf(path):
        yield _gguf(path)
        return
    with lazy.opened(path) as (name, tensors, metadata):
        yield _safetensors(tensors, metadata, name, folder.config(path))


def _safetensors(tensors: lazy.LazyTensors, metadata: Mapping[str, str], name: str, config: Mapping) -> Pieces:
    load.mark(tensors, metadata, name)
    found, what = marks.read(metadata, config, name), lazy.entries(tensors)
    marks.refuse(what, found, name)
    layers, dense = _outline(tensors, name, found.lite)
    naming = None
    if layers:
        naming = native.naming({n: shape for n, (_, shape) in what.items()}, found.config, name)
        joined = {naming.prefix + s for p in naming.places if p.axis == ROWS and len(p.sources) > 1 for s in p.sources}
        if joined:
            layers, dense = _outline(tensors, name, found.lite, joined)
        native.to_native(layers, dense, naming, name)

    def take(members: list[str]) -> tuple[Layers, Dense]:
        dense = {n: tensors[n] for n in members}
        return load.take_layers(dense, name, lite=found.lite), dense

    return Pieces(Checkpoint(name, dense, layers, metadata), _groups(what, naming), naming, take)


def _outline(tensors: lazy.LazyTensors, name: str, lite: bool, joined: Collection[str] = ()) -> tuple[Layers, Dense]:
    """The layers and dense tensors without values, those apart that decide. ``joined``: layers that become one."""
    dense = {}
    for n in tensors:
        layer, _, last = n.rpartition(".")
        if last in DESCRIBES or bnb.MARK in n or (last in SHARED and layer in joined):
            dense[n] = tensors[n]
        else:
            dense[n] = torch.empty(tensors.entry(n)[1], dtype=tensors.dtype(n), device="meta")
    return load.take_layers(dense, name, lite=lite), dense


def _gguf(path: Path) -> Pieces:
    reader = gguf.open_file(path)
    layers, dense = gguf.take(reader, path, reader.tensors, values=False)
    shapes = {f"{n}.weight": layer.weight.shape for n, layer in layers.items()}
    shapes |= {n: tuple(t.shape) for n, t in dense.items()}
    naming = native.naming(shapes, {}, path.name)
    native.to_native(layers, dense, naming, path.name)
    outline = Checkpoint(path.name, dense, layers, gguf.about(reader, path))
    by_name = {t.name: t for t in reader.tensors}

    def take(members: list[str]) -> tuple[Layers, Dense]:
        return gguf.take(reader, path, [by_name[n] for n in members])

    return Pieces(outline, _groups(by_name, naming), naming, take)


def _groups(names: Collection[str], naming: native.Naming | None) -> list[tuple[tuple[Place, ...], list[str]]]:
    """(a place, or none; the tensors of it) for all ``names``, in their order."""
    by_name: dict[str, Place] = {}
    places = naming.places if naming else ()
    for name, place in [(n, p) for p in places for n in p.sources] + [(n, p) for p in places for n in p.natives]:
        by_name.setdefault(naming.prefix + name, place)
    out: dict[object, tuple[tuple[Place, ...], list[str]]] = {}
    known = set(names)
    for name in names:
        layer = _layer(name, known)
        place = by_name.get(name) or by_name.get(layer)
        out.setdefault(place or layer, ((place,) if place else (), []))[1].append(name)
    return list(out.values())


def _layer(name: str, names: Collection[str]) -> str:
    """The layer that the tensor ``name`` is read with."""
    layer, _ = marks.layer_of(name)
    while (part := PART.fullmatch(layer)) and part[1] + comfy_quant.SUFFIX in names:
        layer = part[1]
    return layer
