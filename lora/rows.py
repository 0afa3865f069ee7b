"""The part of an update that one layer takes, as an update of its own: a fused file on split layers, swapped halves.

    fused file, split layers    to_qkv (3 n rows) on to_q, to_k, to_v: each takes its own rows
    split file, fused layer     to_k on qkv: the layer's rows n .. 2 n take all of it
    swapped halves              (scale, shift) on a layer that holds (shift, scale)

Rows of a matrix that is added are rows of its left factor. The others, where rows belong together:

    LoKr     rows of kron(w1, w2) are rows of w1 where they end with a block of w2; else of its exact product
    OFT      whole blocks only; BOFT none: each of its stages mixes rows that lie further apart
    DoRA     a magnitude per row goes with its row. Per input, the length of a column is that of all rows together:
             ||(W + D)_j||^2 = sum over layers, so each layer takes m_j ||(W_i + D_i)_j|| / ||(W + D)_j||
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .read import Update
from .status import Refused
from .weights import DoraWeights, GloraWeights, LokrWeights, OftWeights, inner, lengths, low_rank_is_smaller

# kind -> the tensors whose rows are the update's rows
LEFT = {"lora": ("up",), "loha": ("hada_w1_a", "hada_w2_a")}
LEFT |= {"diff": ("diff",), "set": ("set_weight",), "bias": ("diff_b",)}
OF_NUMBERS = ("diff", "set", "bias")  # what a norm or a bias can take


@dataclass(frozen=True)
class Region:
    """What takes a part of an update: a weight, or some of its rows (``inside``). ``source``: which rows of the update,
    (start, number), None for all. ``swap``: the halves of those rows change places.
    """

    shape: tuple[int, ...]
    source: tuple[int, int] | None = None
    swap: bool = False
    inside: bool = False

    def spans(self) -> list[tuple[int, int]]:
        """The rows of the update that make this region's, from its first row to its last."""
        start, n = self.source or (0, self.shape[0])
        second = n // 2
        return [(start + n - second, second), (start, n - second)] if self.swap else [(start, n)]


def divide(update: Update, regions: Sequence[Region], dense: Callable[[int], Tensor] | None = None) -> list[Update]:
    """What each of ``regions`` takes of ``update``. Raises Refused, with the reason, where one cannot.

    ``dense``: number of a region -> its weight in float32, for updates that depend on all of them together.
    """
    _check(update, regions)
    parts = [_shaped(_rows(update, r), r) for r in regions]
    if len(regions) > 1 and "dora_scale" in update.parts and not update.weights.by_row:
        return _lengths_shared(parts, dense)
    return parts


def _check(update: Update, regions: Sequence[Region]) -> None:
    """Raises Refused when ``update`` is made for another shape than that of ``regions`` together."""
    if "reshape" in update.parts:
        return _check_reshape(update, regions)
    weights, rows = update.weights, sum(r.shape[0] for r in regions)
    n, k = weights.shape
    if min(len(r.shape) for r in regions) < 2 and update.kind not in OF_NUMBERS:
        raise Refused("shape", f"made for {n} x {k or 'any'}, the layer has {rows} numbers")
    columns = {torch.Size(r.shape[1:]).numel() for r in regions}
    if n != rows or (k is not None and columns != {k}):
        made = f"{n} rows" if k is None else f"{n} x {k}"
        where = f"its {len(regions)} layers have" if len(regions) > 1 else "the layer has"
        raise Refused("shape", f"made for {made}, {where} {rows} x {' or '.join(map(str, sorted(columns)))}")
    plain = inner(weights)
    if isinstance(plain, GloraWeights) and not all(plain.fits(r.shape) for r in regions):
        raise Refused("shape", f"made for {plain.a_in.shape[0]} inputs")
    if isinstance(weights, DoraWeights):
        found, inputs = weights.magnitude.numel(), regions[0].shape[1]
        if found != (n if weights.by_row else inputs):
            raise Refused("shape", f"it has {found} DoRA magnitudes, the layer has {n} rows and {inputs} inputs")


def _check_reshape(update: Update, regions: Sequence[Region]) -> None:
    """A LoRA that makes its layer larger fits one whole layer, in its own order."""
    new, here = tuple(int(s) for s in update.parts["reshape"].flatten().tolist()), regions[0].shape
    if len(regions) > 1 or regions[0] != Region(here):
        raise Refused("rows", "a LoRA that makes its layer larger")
    if not new or update.weights.shape != (new[0], torch.Size(new[1:]).numel()):
        raise Refused("halves", f"its new shape {new} is not its factors'")
    if len(new) != len(here) or any(a < b for a, b in zip(new, here, strict=True)):
        raise Refused("shape", f"made for at most {new}, the layer has {here}")


def _rows(update: Update, region: Region) -> Update:
    """The rows of ``update`` that ``region`` takes, in its order."""
    spans, kind, parts = region.spans(), update.kind, dict(update.parts)
    if spans == [(0, update.weights.shape[0])]:
        return update
    if kind == "boft":
        raise Refused("rows", update.title)
    if isinstance(update.weights, DoraWeights) and update.weights.by_row:
        parts["dora_scale"] = take(parts["dora_scale"], 0, spans)
    if kind == "oft":
        return update.of(**_oft(parts, update.weights, spans))
    if kind == "lokr":
        return _lokr(update.of(**parts), spans)
    axis = 1 if "hada_t1" in parts else 0
    left = LEFT[kind] if kind != "glora" else ("b2",) if inner(update.weights).old else ("b1",)
    return update.of(**parts | {name: take(parts[name], axis, spans) for name in left})


def take(tensor: Tensor, axis: int, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Rows (start, number) of ``tensor`` along ``axis``, one span after the other."""
    found = [tensor.narrow(axis, *span) for span in spans]
    return found[0] if len(found) == 1 else torch.cat(found, axis)


def _oft(parts: dict[str, Tensor], weights: OftWeights, spans: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    size = weights.blocks.shape[1]
    if any(start % size or n % size for start, n in spans):
        raise Refused("rows", f"OFT in blocks of {size} rows, which lie across two layers")
    # The constraint holds all blocks together, so it is applied before they part.
    blocks = weights.constrained().float() if parts.pop("alpha", None) is not None else weights.blocks
    parts["oft_blocks"] = take(blocks, 0, [(start // size, n // size) for start, n in spans])
    if weights.rescale is not None:
        parts["rescale"] = take(weights.rescale.reshape(-1), 0, spans)
    return parts


def _lokr(update: Update, spans: Sequence[tuple[int, int]]) -> Update:
    """Rows of w1 where ``spans`` end with blocks of w2's rows, else of the product: as two thin factors, or as the
    matrix itself where that is smaller.
    """
    parts, weights = dict(update.parts), inner(update.weights)
    block = weights.w2[0].shape[0]
    if not any(start % block or n % block for start, n in spans):
        left = "lokr_w1" if "lokr_w1" in parts else "lokr_w1_a"
        parts[left] = take(parts[left], 0, [(start // block, n // block) for start, n in spans])
        return update.of(**parts)
    first, end = min(s for s, _ in spans) // block, max(-(-(s + n) // block) for s, n in spans)
    some = LokrWeights((weights.w1[0][first:end], *weights.w1[1:]), weights.w2, weights.scale)
    spans = [(start - first * block, n) for start, n in spans]
    shape, dora = (sum(n for _, n in spans), some.shape[1]), {r: t for r, t in parts.items() if r == "dora_scale"}
    if dora or low_rank_is_smaller(some.rank, shape):
        down, up = some.scaled(1.0)
        return update.of("lora", down=down.t().contiguous(), up=take(up, 0, spans), **dora)
    return update.of("diff", diff=take(some.delta(), 0, spans))


def _shaped(update: Update, region: Region) -> Update:
    """``update`` in the shapes that ComfyUI wants beside a weight of the region's shape."""
    n, *rest = region.shape
    shapes = dict.fromkeys(("diff", "set_weight", "diff_b"), region.shape) | {"rescale": (n, *(1 for _ in rest))}
    if isinstance(update.weights, DoraWeights):
        by_row = update.weights.by_row
        shapes["dora_scale"] = shapes["rescale"] if by_row else (1, rest[0], *(1 for _ in rest[1:]))
    return update.of(**{r: t.reshape(shapes[r]) if r in shapes else t for r, t in update.parts.items()})


def _lengths_shared(parts: list[Update], dense: Callable[[int], Tensor] | None) -> list[Update]:
    """DoRA per input over several layers: each gets its share of the magnitudes, by the lengths it has at full
    strength.
    """
    if dense is None:
        raise Refused("rows", "DoRA per input, whose lengths are those of all layers together")
    each = [lengths(part.weights.inner.patched(dense(i), 1.0).double(), False) for i, part in enumerate(parts)]
    whole = torch.stack(each).square().sum(0).sqrt().clamp(min=1e-30)
    return [
        part.of(**part.parts | {"dora_scale": (part.parts["dora_scale"].double().to(mine) * mine / whole).float()})
        for part, mine in zip(parts, each, strict=True)
    ]
