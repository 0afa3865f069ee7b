"""From a publisher's names to ComfyUI's: which family, and each layer joined, cut and put in order as the model has it.

Formats hand out layers under the file's names, families say where those stand; this brings the two together.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..families import GENERIC, by_diffusers_class, detect, detect_published
from ..families.spec import FamilySpec, Place
from ..quant import parts
from .errors import CheckpointError
from .errors import naming as naming_layer
from .formats.nunchaku import logical_shapes
from .formats.stored import StoredLayer

OTHER = "Load it with the pack that made it"
ENDS = ("weight", "bias")


@dataclass(frozen=True)
class Naming:
    """Whose names a file has. ``places`` are empty when they are native already."""

    family: FamilySpec
    title: str
    prefix: str
    places: tuple[Place, ...]
    closed: bool = False  # a name without a place is an error


MOST_BLOCKS = 512
COUNTS = ("num_layers", "num_single_layers", "layers_per_block", "transformer_layers_per_block")


def naming(shapes: Mapping[str, tuple[int, ...]], config: Mapping, file: str) -> Naming:
    """Whose names these are: native ones, a publisher's, or those of the diffusers class in ``config``. Raises
    CheckpointError for a config that describes no model.
    """
    try:
        return _naming(shapes, config)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as e:
        what = f"its config describes no model ({str(e)[:100]})"
        raise CheckpointError(file, what, "Download or write the file again") from e


def _check_counts(config: Mapping) -> None:
    """Raises ValueError for numbers of blocks that no model has: a loop would run for ever."""
    counts = [config.get(key, 1) for key in COUNTS]
    counts = [n for c in counts for n in (c if isinstance(c, list | tuple) else [c])]
    if any(not isinstance(n, int) or n > MOST_BLOCKS for n in counts) or len(counts) > MOST_BLOCKS:
        raise ValueError(f"block counts {str(counts)[:60]}")


def _naming(shapes: Mapping[str, tuple[int, ...]], config: Mapping) -> Naming:
    found = detect_published(shapes)
    if found is not None:
        family, published, prefix = found
        _check_counts(config)
        inner = [n[len(prefix) :] for n in shapes if n.startswith(prefix)]
        places = tuple(published.places(inner, config))
        return Naming(family, published.title, prefix, places, published.others == "none")
    family, prefix = detect(logical_shapes(shapes))
    known = by_diffusers_class(str(config.get("_class_name", "")), config)
    if family is not GENERIC or known is None:
        return Naming(family, "native", prefix, ())
    _check_counts(config)
    rules = [r for r in known.key_rules(config) if not r.native.endswith(".bias")]
    places = []
    for r in rules:
        bare = [n.removesuffix(".weight") for n in (r.native, *r.sources)]
        places.append(Place(tuple(bare[1:]), (bare[0],), swap_halves=r.swap_halves))
    return Naming(known, "diffusers", "", tuple(places), closed=True)


def to_native(
    layers: MutableMapping[str, StoredLayer], dense: MutableMapping[str, Tensor], names: Naming, file: str
) -> None:
    """Moves ``layers`` and ``dense`` in place to native names. Raises CheckpointError naming the layer."""
    p, moved, moved_dense = names.prefix, {}, {}
    for place in names.places:
        have = [p + s in layers or _dense_keys(dense, p + s) for s in place.sources]
        if not have[0]:
            continue  # another spelling, or a part this variant lacks
        if not all(have):
            gone = place.sources[have.index(False)]
            raise CheckpointError(file, "this layer is missing", "Download the file again", p + gone)
        taken = [_take(layers, dense, p + s) for s in place.sources]
        with naming_layer(file, OTHER, p + place.sources[0]):
            _put(place, taken, moved, moved_dense, p)
    if names.closed and names.places:
        left = next((n for n in (*layers, *dense) if n.startswith(p)), None)
        if left is not None:
            where = f"{names.family.title} as {names.title} writes it"
            raise CheckpointError(file, f"it has no place in {where}, or a layer beside it is missing", OTHER, left)
    twice = (moved.keys() & layers.keys()) | (moved_dense.keys() & dense.keys())
    if twice:
        raise CheckpointError(file, "two layers claim this name", OTHER, min(twice))
    layers.update(moved)
    dense.update(moved_dense)


@dataclass(frozen=True)
class _Taken:
    name: str
    layer: StoredLayer | None
    weight: Tensor | None
    bias: Tensor | None
    whole: Tensor | None = None  # a tensor that is no layer


def _dense_keys(dense: Mapping[str, Tensor], name: str) -> bool:
    return name in dense or any(f"{name}.{end}" in dense for end in ENDS)


def _take(layers, dense, name: str) -> _Taken:
    weight, bias = (dense.pop(f"{name}.{end}", None) for end in ENDS)
    return _Taken(name, layers.pop(name, None), weight, bias, dense.pop(name, None))


def _put(place: Place, taken: list[_Taken], layers: dict, dense: dict, prefix: str) -> None:
    """One place's tensors into ``layers`` and ``dense`` under native names."""
    natives = [prefix + n for n in place.natives]
    if taken[0].whole is not None:
        dense[natives[0]] = taken[0].whole if len(taken) == 1 else torch.cat([t.whole for t in taken])
        return
    if any(t.layer is not None for t in taken):
        if any(t.layer is None for t in taken):
            raise ValueError("one half of a fused layer is 4-bit and the other is not")
        weight = parts.join([_prepared(t, place, prefix).weight for t in taken], place.axis)
        forms = {t.layer.form for t in taken}
        cut = _cut(weight, len(natives))
        for native, w in zip(natives, cut, strict=True):
            layers[native] = StoredLayer(w, form=min(forms))
    elif taken[0].weight is not None:
        _put_dense(place, [t.weight for t in taken], natives, "weight", dense)
    bias = _bias(place, taken)
    if bias is not None:
        _put_dense(place, [bias], natives, "bias", dense)


def _prepared(t: _Taken, place: Place, prefix: str) -> StoredLayer:
    """A source's layer with what its file does not say: activations, order of rows, real size."""
    w = t.layer.weight
    if place.shape and w.shape != place.shape and t.layer.padded:
        w = parts.crop(w, *place.shape)
    if t.layer.unsigned and t.name[len(prefix) :] in place.unsigned:
        w = replace(w, act_unsigned=True)
    if _woven(t, place):
        order = natural_rows(w.shape[0], place.interleaved)
        w = replace(w, qweight=w.qweight[order], wscales=w.wscales[:, order], wzeros=w.wzeros[:, order])
    return replace(t.layer, weight=w)


def _woven(t: _Taken, place: Place) -> bool:
    return bool(place.interleaved) and t.layer is not None and t.layer.woven


def natural_rows(n: int, vectors: int) -> Tensor:
    """Where each natural row is stored: row j * (N/S) + c of a modulation of S vectors stands at c * S + j."""
    if n % vectors:
        raise ValueError(f"{n} rows are not {vectors} vectors")
    return torch.arange(n).reshape(n // vectors, vectors).t().reshape(-1)


def _bias(place: Place, taken: list[_Taken]) -> Tensor | None:
    """The joined bias; where only some sources have one, the others count as zero."""
    known = [t.bias for t in taken if t.bias is not None]
    if not known:
        return None
    if place.axis == parts.COLUMNS:
        return sum(b.float() for b in known).to(known[0].dtype) if len(known) > 1 else known[0]
    out = []
    for t in taken:
        rows = t.layer.weight.shape[0] if t.layer else t.weight.shape[0] if t.weight is not None else t.bias.shape[0]
        bias = known[0].new_zeros(rows) if t.bias is None else t.bias
        if place.shape and t.layer is not None:
            bias = bias[: place.shape[0]]
        if _woven(t, place):
            bias = _without_ones(bias[natural_rows(bias.shape[0], place.interleaved)], place)
        out.append(bias)
    return torch.cat(out)


def _without_ones(bias: Tensor, place: Place) -> Tensor:
    """Takes the publisher's 1 off again. In float32: the difference has more digits than 16 bits keep."""
    vectors = bias.float().reshape(place.interleaved, -1).clone()
    vectors[list(place.plus_one)] -= 1
    return vectors.reshape(-1)


def _cut(weight: parts.Plain | parts.Parts, pieces: int) -> list:
    if pieces == 1:
        return [weight]
    n = weight.shape[0]
    if n % pieces:
        raise ValueError(f"{n} rows are not {pieces} layers")
    step = n // pieces
    return [parts.take_rows(weight, i * step, (i + 1) * step) for i in range(pieces)]


def _put_dense(place: Place, values: list[Tensor], natives: list[str], end: str, dense: dict) -> None:
    across = 1 if place.axis == parts.COLUMNS and end == "weight" else 0
    value = values[0] if len(values) == 1 else torch.cat(values, across)
    if place.swap_halves:
        value = torch.cat(value.chunk(2)[::-1])
    if value.shape[0] % len(natives):
        raise ValueError(f"{value.shape[0]} rows are not {len(natives)} layers")
    for native, piece in zip(natives, value.chunk(len(natives)), strict=True):
        dense[f"{native}.{end}"] = piece.contiguous()
