"""The tensors of one target -> what they add, one builder a kind. What fits nothing is refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .status import Refused
from .weights import (
    BoftWeights,
    DiffWeights,
    DoraWeights,
    GloraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    OftWeights,
    SetWeights,
    Weights,
    tucker,
)

Parts = Mapping[str, Tensor]


def build(kind: str, parts: Parts) -> Weights:
    """What ``parts`` add. Raises Refused when they do not fit each other."""
    weights = BUILDERS[kind](parts)
    return DoraWeights(weights, parts["dora_scale"]) if "dora_scale" in parts else weights


def rank_of(parts: Parts) -> int | None:
    """The rank that alpha is divided by; None for an update that shows none (LoKr of two whole matrices, a diff)."""
    down = next((parts[r] for r in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if r in parts), None)
    return None if down is None or down.dim() == 0 else down.shape[0]


def _matrices(parts: Parts, *names: str) -> list[Tensor]:
    """The tensors of ``names``. Raises Refused when one is no matrix or kernel."""
    for name in names:
        if parts[name].dim() < 2:
            raise Refused("halves", f"{name} has the shape {tuple(parts[name].shape)}")
    return [parts[name] for name in names]


def _shared(parts: Parts, one: tuple[str, int], two: tuple[str, int], what: str = "a rank") -> int:
    """The size that two tensors share along these axes. Raises Refused when they do not."""
    a, b = _matrices(parts, one[0], two[0])
    if a.shape[one[1]] != b.shape[two[1]]:
        raise Refused("halves", f"{one[0]} {tuple(a.shape)} and {two[0]} {tuple(b.shape)} do not share {what}")
    if a.shape[one[1]] == 0:
        raise Refused("empty", "rank 0")
    return a.shape[one[1]]


def _alpha(parts: Parts, rank: int) -> float:
    return float(parts["alpha"]) if "alpha" in parts else float(rank)


def _core(parts: Parts, name: str, rank: int) -> Tensor:
    """A convolution's Tucker core (r, r, kh, kw)."""
    core = parts[name]
    if core.dim() != 4 or tuple(core.shape[:2]) != (rank, rank):
        raise Refused("halves", f"{name} has the shape {tuple(core.shape)}, its rank is {rank}")
    return core


def _lora(parts: Parts) -> Weights:
    rank = _shared(parts, ("down", 0), ("up", 1))
    down, up = parts["down"], parts["up"]
    if up.flatten(1).shape[1] != rank:
        raise Refused("halves", f"up has the shape {tuple(up.shape)}, its rank is {rank}")
    mid = _core(parts, "mid", rank) if "mid" in parts else None
    if mid is not None and down.flatten(1).shape[1] != down.shape[1]:
        raise Refused("halves", f"down has the shape {tuple(down.shape)} beside a core")
    return LoraWeights(down, up, _alpha(parts, rank), mid)


def _loha(parts: Parts) -> Weights:
    cores = [name for name in ("hada_t1", "hada_t2") if name in parts]
    if len(cores) == 1:
        raise Refused("incomplete", "no hada_t1" if cores == ["hada_t2"] else "no hada_t2")
    rows = 1 if cores else 0  # beside cores, the first factors lie on their side
    ranks = [_shared(parts, (f"hada_w{i}_a", 1 - rows), (f"hada_w{i}_b", 0)) for i in (1, 2)]
    _shared(parts, ("hada_w1_a", rows), ("hada_w2_a", rows), "their rows")
    _shared(parts, ("hada_w1_b", 1), ("hada_w2_b", 1), "their columns")
    t1, t2 = (_core(parts, name, rank) for name, rank in zip(cores, ranks, strict=True)) if cores else (None, None)
    factors = _matrices(parts, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return LohaWeights(*factors, _alpha(parts, ranks[0]), t1, t2)


def _lokr(parts: Parts) -> Weights:
    sides, rank = [], None
    for side in ("lokr_w1", "lokr_w2"):
        if side in parts:
            sides.append((_matrices(parts, side)[0],))
        elif side == "lokr_w2" and "lokr_t2" in parts:
            rank = _shared(parts, ("lokr_w2_a", 0), ("lokr_w2_b", 0))
            core = _core(parts, "lokr_t2", rank)
            sides.append((tucker(core, parts["lokr_w2_a"], parts["lokr_w2_b"]),))
        else:
            rank = _shared(parts, (f"{side}_a", 1), (f"{side}_b", 0))
            sides.append((parts[f"{side}_a"], parts[f"{side}_b"]))
    return LokrWeights(*sides, 1.0 if rank is None else _alpha(parts, rank) / rank)


def _oft(parts: Parts) -> Weights:
    blocks, rescale = parts["oft_blocks"], parts.get("rescale")
    if blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2]:
        raise Refused("halves", f"oft_blocks have the shape {tuple(blocks.shape)}")
    return OftWeights(blocks, _constraint(parts), _rescale(rescale, blocks.shape[0] * blocks.shape[1]))


def _boft(parts: Parts) -> Weights:
    blocks, rescale = parts["oft_blocks"], parts.get("rescale")
    stages, number, size = blocks.shape[:3]
    if size != blocks.shape[3] or size % 2 or 0 in blocks.shape or (number * size) % (size << (stages - 1)):
        raise Refused("halves", f"oft_blocks have the shape {tuple(blocks.shape)}")
    return BoftWeights(blocks, _constraint(parts), _rescale(rescale, number * size))


def _constraint(parts: Parts) -> float:
    """What these two call alpha: the largest norm of all blocks together, 0 for any."""
    return float(parts["alpha"]) if "alpha" in parts else 0.0


def _rescale(rescale: Tensor | None, rows: int) -> Tensor | None:
    if rescale is not None and rescale.numel() != rows:
        raise Refused("halves", f"rescale {tuple(rescale.shape)} is not for {rows} rows")
    return rescale


def _glora(parts: Parts) -> Weights:
    """Old files: a1 (r, K), a2 (K, r), b1 (r, K), b2 (N, r). New ones: a1 (K, r), a2 (r, K), b1 (N, r), b2 (r, K)."""
    a1, a2, b1, b2 = _matrices(parts, "a1", "a2", "b1", "b2")
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1] and b2.shape[0] >= b2.shape[1]
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if not old and not new:
        shapes = ", ".join(f"{n} {tuple(parts[n].shape)}" for n in ("a1", "a2", "b1", "b2"))
        raise Refused("halves", f"{shapes} do not share a rank")
    a, b = ((a2, a1), (b2, b1)) if old else ((a1, a2), (b1, b2))
    rank = b[1].shape[0]
    if rank == 0:
        raise Refused("empty", "rank 0")
    return GloraWeights(*a, *b, _alpha(parts, rank), old)


def _diff(parts: Parts) -> Weights:
    return DiffWeights(_some(parts["diff"]))


def _set(parts: Parts) -> Weights:
    return SetWeights(_some(parts["set_weight"]))


def _bias(parts: Parts) -> Weights:
    return DiffWeights(_some(parts["diff_b"]))


def _some(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0:
        raise Refused("empty", "no numbers")
    return tensor


BUILDERS = {
    "lora": _lora, "loha": _loha, "lokr": _lokr, "oft": _oft, "boft": _boft, "glora": _glora, "diff": _diff,
    "set": _set, "bias": _bias,
}  # fmt: skip
