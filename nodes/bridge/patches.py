"""ComfyUI's weight patches on one quantized weight: a longer low-rank branch, or, where there is none, the exact dense
one.

A patch is ComfyUI's tuple (strength, value, strength of the model, offset, function). The codes are shared with the
unpatched weight and never rounded again. No state is kept but on ComfyUI's own patch objects (`on_the_fly`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

import comfy.lora
import comfy.utils
import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, WeightAdapterBase
from comfy.weight_adapter.boft import BOFTAdapter
from comfy.weight_adapter.glora import GLoRAAdapter
from comfy.weight_adapter.oft import OFTAdapter
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ...lora.apply import placed
from ...lora.build import build
from ...lora.names import Slot
from ...lora.read import finite as is_finite
from ...lora.status import Refused
from ...lora.weights import (
    DiffWeights,
    GloraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    SetWeights,
    Weights,
    grown,
    inner,
    padded,
    padded_rank,
    stays_low_rank,
)
from ...quant import kernels

log = logging.getLogger(__name__)


def dense(weight: QuantizedTensor) -> Tensor:
    """The effective (N, K) float32 weight of a quantized one; kitchen's own way, an identity matrix, is less exact."""
    return kernels.dense(weight)


def shift_of(weight: QuantizedTensor) -> Tensor | None:
    """(N,) that a dense forward must add to the stored bias of an unsigned layer; None for every other weight."""
    return kernels.shift(weight)


# ComfyUI's adapter classes -> (kind, what their ``weights`` hold, in this order, in the words of lora/build.py)
ADAPTERS = {
    LoRAAdapter: ("lora", ("up", "down", "alpha", "mid", "dora_scale", "reshape")),
    LoHaAdapter: ("loha", ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
                           "dora_scale")),
    LoKrAdapter: ("lokr", ("lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
                           "dora_scale")),
    GLoRAAdapter: ("glora", ("a1", "a2", "b1", "b2", "alpha", "dora_scale")),
    OFTAdapter: ("oft", ("oft_blocks", "rescale", "alpha", "dora_scale")),
    BOFTAdapter: ("boft", ("oft_blocks", "rescale", "alpha", "dora_scale")),
}  # fmt: skip
SUMS = (LoraWeights, LohaWeights, LokrWeights)


def update(value) -> Weights | None:
    """ComfyUI's patch as this pack's update; None for what no kind of it is. Raises Refused for parts that do not fit
    each other: ComfyUI fails on them while it samples, and goes on without.
    """
    kind, names = ADAPTERS.get(type(value), ("", ()))
    if kind:
        parts = {n: t for n, t in zip(names, value.weights, strict=False) if t is not None}
        try:
            return build(kind, parts)
        except (KeyError, IndexError) as e:
            raise Refused("incomplete") from e
        except ValueError as e:
            raise e if isinstance(e, Refused) else Refused("halves") from e
    if isinstance(value, tuple) and len(value) == 2 and value[0] in ("diff", "set") and len(value[1]) == 1:
        return (DiffWeights if value[0] == "diff" else SetWeights)(value[1][0])
    return None


def plain(value) -> Weights | None:
    """ComfyUI's adapter as this pack's, or None for one that is more than a sum (DoRA, OFT ...)."""
    if type(value) is LoRAAdapter and value.weights[5] is not None:
        return None  # it makes its layer larger
    if type(value) is LoKrAdapter and value.weights[7] is not None:
        return None  # ComfyUI multiplies its core in its own way
    try:
        weights = update(value)
    except Refused:
        return None
    return weights if isinstance(weights, SUMS) else None


def live(patches: Sequence[tuple]) -> list[tuple]:
    """``patches`` without those that change nothing: strength 0 on an unscaled model. ("set" ignores its strength.)"""
    return [p for p in patches if p[0] != 0 or p[2] != 1.0 or _always(p[1])]


def _always(value) -> bool:
    if isinstance(value, WeightAdapterBase):
        return value.calculate_shape("") is not None
    return isinstance(value, tuple) and len(value) == 2 and (value[0] == "set" or len(value[1]) > 1)


def _term(patch: tuple, shape: tuple[int, int]) -> Weights | None:
    """The update of a patch that is a low-rank sum on a weight of ``shape``; None for any other."""
    _, value, strength_model, offset, function = patch
    weights = plain(value) if strength_model == 1.0 else None
    if weights is None or not stays_low_rank(weights):
        return None
    if function not in (None, comfy.utils.swap_scale_shift) or (offset is not None and offset[0] not in (0, 1)):
        return None
    n, k = shape
    if offset is not None:
        n, k = (offset[2], k) if offset[0] == 0 else (n, offset[2])
    return weights if weights.shape == (n, k) else None


def rank_of(patches: Sequence[tuple], shape: tuple[int, int]) -> int | None:
    """By how much ``patches`` lengthen the branch of a weight of ``shape``; None when it becomes dense."""
    terms = [_term(patch, shape) for patch in patches]
    return None if any(t is None for t in terms) else sum(t.rank for t in terms)


def growth(weight: QuantizedTensor, stored: int, patches: Sequence[tuple]) -> int:
    """Bytes by which ``patches`` make a weight larger than the ``stored`` ones it was loaded with."""
    pending = live(patches)
    if not pending:
        return 0
    (n, k), rank = weight.shape, rank_of(pending, tuple(weight.shape))
    if rank is None:
        return n * k * weight.dtype.itemsize - stored
    here = getattr(weight._params, "proj_down", None)
    here = 0 if here is None else here.shape[1]
    side = kernels.side_dtype(weight).itemsize
    return (padded_rank(here + rank) - here) * (n + k) * side


def factors(patches: Sequence[tuple], shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """(down (K, r), up (N, r)) float32 that ``patches`` add to a weight of ``shape``; None when they are no such sum.

    Fused q/k/v keys name some rows (offset): the others get zeros. The parts are put in an order of their own, so that
    the order of the LoRAs does not even change rounding (which 4-bit activations would make visible).
    """
    parts = []
    for patch in patches:
        strength, _, _, offset, function = patch
        weights = _term(patch, shape)
        if weights is None:
            return None
        down, up = weights.scaled(strength)
        rows = offset[1:3] if offset is not None and offset[0] == 0 else None
        up = placed(up, Slot("", into=rows, swap=function is not None), shape[0])
        columns = offset[1:3] if offset is not None and offset[0] == 1 else None
        parts.append((placed(down, Slot("", into=columns), shape[1]), up))
    parts.sort(key=_order)
    device = parts[0][0].device
    return torch.cat([down for down, _ in parts], 1), torch.cat([up.to(device) for _, up in parts], 1)


def _order(part: tuple[Tensor, Tensor]) -> tuple:
    """Decides by content alone where a LoRA stands in the branch."""
    down, up = part
    return down.shape[1], float(up.abs().sum()), float(down.abs().sum()), down[:4].flatten().tolist()


def patched(weight: QuantizedTensor, patches: Sequence[tuple], key: str, original: dict | None = None) -> Tensor:
    """``weight`` with ``patches``: quantized when they all fit into the branch, else dense in the weight's dtype.

    Without a patch that changes anything it is ``weight`` itself. ``original``: ComfyUI's original_weights.
    """
    pending = live(patches)
    if not pending:
        return weight
    low_rank = factors(pending, tuple(weight.shape))
    if low_rank is not None:
        return grown(weight, *low_rank)
    before = dense(weight)
    after = comfy.lora.calculate_weight(pending, before.clone(), key, original_weights=original)
    adapters = any(isinstance(p[1], WeightAdapterBase) for p in pending)
    if adapters and torch.equal(before, after):
        kinds = ", ".join(sorted({type(p[1]).__name__ for p in pending}))
        log.warning("%s: a patch (%s) did not change this layer; ComfyUI's message above says why", key, kinds)
    return after.to(weight.dtype)


def on_the_fly(weight: QuantizedTensor, functions: Iterable) -> Tensor:
    """``weight`` with ComfyUI's weight functions, as a partially loaded model applies them on every forward: the same
    value, bit for bit, that `patched` puts into a loaded model.
    """
    functions = list(functions)
    if not functions:
        return weight
    if all(getattr(f, "is_lowvram_patch", False) for f in functions):
        pending = live([patch for f in functions for patch in f.patches.get(f.key, ())])
        low_rank = _remembered(functions[0], pending, weight) if pending else None
        return patched(weight, pending, functions[0].key) if low_rank is None else grown(weight, *low_rank)
    value = dense(weight)
    for function in functions:
        value = function(value)
    return value.to(weight.dtype)


def _remembered(holder, pending: Sequence[tuple], weight: QuantizedTensor) -> tuple[Tensor, Tensor] | None:
    """`factors` as `grown` takes them, in the weight's own dtype and beside it, once for each of ComfyUI's patch
    objects: it makes new ones whenever patches change.
    """
    device, dtype = weight._qdata.device, kernels.side_dtype(weight)
    kept = getattr(holder, "nibble_factors", ())
    if kept == () or (kept is not None and (kept[0].device, kept[0].dtype) != (device, dtype)):
        low_rank = factors(pending, tuple(weight.shape))
        kept = None if low_rank is None else tuple(t.to(device, dtype) for t in padded(weight, *low_rank))
        holder.nibble_factors = kept
    return kept


def finite(value) -> bool:
    """Whether every number of a patch's value is one: in its tensors, and its alpha."""
    if isinstance(value, WeightAdapterBase):
        return finite(tuple(value.weights))
    if isinstance(value, (tuple, list)):
        return all(map(finite, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, Tensor) or is_finite(value)


def fits(value, shape: tuple[int, ...], offset: tuple[int, int, int] | None = None) -> bool:
    """Whether a patch's value belongs on a weight of ``shape`` (True where it does not say)."""
    try:
        weights = update(value)
    except Refused:
        return False
    grows = isinstance(value, WeightAdapterBase) and value.calculate_shape("") is not None
    if weights is None or grows or len(shape) == 0:
        return True
    shape = tuple(offset[2] if offset is not None and i == offset[0] else s for i, s in enumerate(shape))
    (n, k), alone = weights.shape, inner(weights)
    if isinstance(alone, GloraWeights) and not alone.fits(shape):
        return False
    return n == shape[0] and k in (None, torch.Size(shape[1:]).numel())
