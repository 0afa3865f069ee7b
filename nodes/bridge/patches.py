"""ComfyUI's weight patches on one quantized weight: a longer low-rank branch, or, where there is none, the exact dense
one.

A patch is ComfyUI's tuple (strength, value, strength of the model, offset, function). The codes are shared with the
unpatched weight and never rounded again. No state is kept but on ComfyUI's own patch objects (`on_the_fly`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import comfy.lora
import comfy.utils
import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, WeightAdapterBase
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ...lora.apply import placed
from ...lora.names import Slot
from ...lora.weights import LohaWeights, LokrWeights, LoraWeights, Weights, stays_low_rank
from ...quant import kernels

log = logging.getLogger(__name__)
# The branch grows to a multiple of this: what tensor cores take at once. Kitchen also keeps one workspace per rank.
RANK_STEP = 16


def dense(weight: QuantizedTensor) -> Tensor:
    """The effective (N, K) float32 weight of a quantized one; kitchen's own way, an identity matrix, is less exact."""
    return kernels.dense(weight)


def shift_of(weight: QuantizedTensor) -> Tensor | None:
    """(N,) that a dense forward must add to the stored bias of an unsigned layer; None for every other weight."""
    return kernels.shift(weight)


def _lora(v) -> Weights | None:
    up, down, alpha, mid, dora, reshape = v
    if dora is not None or reshape is not None:
        return None
    return LoraWeights(down, up, float(down.shape[0] if alpha is None else alpha), mid)


def _loha(v) -> Weights | None:
    w1a, w1b, alpha, w2a, w2b, t1, t2, dora = v
    rank = w1b.shape[0]
    return LohaWeights(w1a, w1b, w2a, w2b, float(rank if alpha is None else alpha), t1, t2) if dora is None else None


def _lokr(v) -> Weights | None:
    w1, w2, alpha, w1a, w1b, w2a, w2b, t2, dora = v
    if dora is not None or t2 is not None:
        return None
    one = (w1a, w1b) if w1 is None else (w1,)
    two = (w2a, w2b) if w2 is None else (w2,)
    if any(t is None for t in (*one, *two)):
        return None  # a half is missing: `fits` leaves it out
    rank = w2b.shape[0] if w2 is None else w1b.shape[0] if w1 is None else None
    return LokrWeights(one, two, 1.0 if alpha is None or rank is None else alpha / rank)


HALVES = ((0, 4), (1, 6))  # of LoKr's weights: each side whole, or the second of its two factors
PLAIN = {LoRAAdapter: _lora, LoHaAdapter: _loha, LoKrAdapter: _lokr}


def plain(value) -> Weights | None:
    """ComfyUI's adapter as this pack's, or None for one that is more than a sum (DoRA, OFT ...)."""
    make = PLAIN.get(type(value))
    return None if make is None else make(value.weights)


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
    return (_padded(here + rank) - here) * (n + k) * side


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


def _padded(rank: int) -> int:
    return -(-rank // RANK_STEP) * RANK_STEP


def grown(weight: QuantizedTensor, down: Tensor, up: Tensor) -> QuantizedTensor:
    """``weight`` with its branch longer by ``up`` ``down``^T, padded to a multiple of `RANK_STEP` with zeros."""
    here = getattr(weight._params, "proj_down", None)
    rank = (0 if here is None else here.shape[1]) + down.shape[1]
    pad = (0, _padded(rank) - rank)
    return kernels.extend(weight, torch.nn.functional.pad(down, pad), torch.nn.functional.pad(up, pad))


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
    """`factors` in the weight's own dtype, once for each of ComfyUI's patch objects: it makes new ones whenever
    patches change.
    """
    if not hasattr(holder, "nibble_factors"):
        low_rank = factors(pending, tuple(weight.shape))
        dtype = kernels.side_dtype(weight)
        holder.nibble_factors = None if low_rank is None else tuple(t.to(dtype) for t in low_rank)
    return holder.nibble_factors


def tensors_of(value) -> list[Tensor]:
    """Every tensor inside a patch's value."""
    if isinstance(value, WeightAdapterBase):
        return tensors_of(tuple(value.weights))
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors_of(item)]
    return [value] if isinstance(value, Tensor) else []


def shape_of(value) -> tuple[int, int] | None:
    """(rows, columns) that a patch's value is made for, where it says; kernels are flattened into columns."""
    weights = plain(value)
    if weights is not None:
        return weights.shape
    if isinstance(value, WeightAdapterBase):
        if type(value) is not LoRAAdapter or value.calculate_shape("") is not None or value.weights[3] is not None:
            return None
        return value.weights[0].shape[0], value.weights[1].flatten(1).shape[1]  # DoRA
    if isinstance(value, tuple) and len(value) == 2 and value[0] == "diff" and len(value[1]) == 1:
        return _flat(value[1][0].shape)
    return None


def _flat(shape) -> tuple[int, int]:
    return shape[0], torch.Size(shape[1:]).numel()


def fits(value, shape: tuple[int, ...], offset: tuple[int, int, int] | None = None) -> bool:
    """Whether a patch's value belongs on a weight of ``shape`` (True where it does not say)."""
    if type(value) is LoKrAdapter and any(value.weights[i] is None and value.weights[j] is None for i, j in HALVES):
        return False  # ComfyUI makes an adapter of one half, and fails when it comes to multiply
    want = shape_of(value)
    if want is None or len(shape) == 0:
        return True
    shape = tuple(offset[2] if offset is not None and i == offset[0] else s for i, s in enumerate(shape))
    return want == _flat(shape)
