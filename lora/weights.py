"""What one layer of a LoRA file holds, one small class a kind; every class says what it adds to the layer's weight.

    kind    tensors                                      adds, times strength                             rank
    lora    down (r, K), up (N, r) [, mid]               alpha/r up down                                  r
    loha    w1a (N, r), w1b (r, K), w2a, w2b             alpha/r (w1a w1b) * (w2a w2b), by element        r^2
    lokr    w1 (a, b), w2 (c, d), each whole or a b      alpha/r kron(w1, w2); no alpha when both whole   below
    glora   a (K, r) (r, K), b (N, r) (r, K)             alpha/r (W a1 a2 + b1 b2)                        -
    oft     blocks (n, b, b): rotations of n b rows      (R^T - 1) W, R = (1 + Q) (1 - Q)^-1 a block      -
    boft    blocks (m, n, b, b): m stages of those       (P R P ... P R P - 1) W                          -
    diff    diff (N, K)                                  diff                                             -
    set     value (N, K)                                 value - W, whatever the strength                 -
    dora    one of the first four, magnitude per row     m (W + added) / ||W + added|| - W                -
            (N, 1 ...) or per input (1, C ...)

K counts a convolution's kernel too: (N, C, kh, kw) is (N, C kh kw). Sources: LyCORIS; kohya sd-scripts; PEFT (DoRA).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor, nn

from ..quant import kernels

# The branch grows to a multiple of this: what tensor cores take at once. Kitchen also keeps one workspace per rank.
RANK_STEP = 16
CODE_BYTES = 0.53  # of a 4-bit weight: half a byte, and a 16-bit scale for every 64


class _Additive:
    """What every kind but DoRA shares: it adds a matrix that does not depend on the weight."""

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """``weight`` (N, K ...) in float32 with this update."""
        return weight + strength * self.delta().to(weight.device).reshape(weight.shape)


@dataclass(frozen=True)
class LoraWeights(_Additive):
    """``alpha`` is the rank where a file names none. ``mid`` (r, r, kh, kw): a convolution's core (LoCon, Tucker)."""

    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self._wide().shape[1]

    def _wide(self) -> Tensor:
        """(r, K) with the kernel's elements in K."""
        if self.mid is None:
            return self.down.flatten(1)
        return torch.einsum("m n ..., n j -> m j ...", self.mid.float(), self.down.flatten(1).float()).flatten(1)

    def scaled(self, strength: float) -> tuple[Tensor, Tensor]:
        """(down (K, r), up (N, r)) float32 with the whole factor in ``up``: what `kernels.extend` takes."""
        return self._wide().float().t(), self.up.flatten(1).float() * (strength * _per_rank(self.alpha, self.rank))

    def delta(self) -> Tensor:
        down, up = self.scaled(1.0)
        return up @ down.t()


@dataclass(frozen=True)
class LohaWeights(_Additive):
    """``t1``, ``t2`` (r, r, kh, kw): a convolution's Tucker cores; then w1a is (r, N) and there is no low-rank form."""

    w1a: Tensor
    w1b: Tensor
    w2a: Tensor
    w2b: Tensor
    alpha: float
    t1: Tensor | None = None
    t2: Tensor | None = None

    @property
    def rank(self) -> int | None:
        return None if self.t1 is not None else self.w1b.shape[0] * self.w2b.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        if self.t1 is None:
            return self.w1a.shape[0], self.w1b.flatten(1).shape[1]
        return self.w1a.shape[1], self.w1b.shape[1] * self.t1[0, 0].numel()

    def scaled(self, strength: float) -> tuple[Tensor, Tensor]:
        """Exact: (A B) * (C D) is the product of A's and C's columns in pairs with B's and D's rows in pairs."""
        w1a, w1b, w2a, w2b = (t.float().flatten(1) for t in (self.w1a, self.w1b, self.w2a, self.w2b))
        up = (w1a.unsqueeze(2) * w2a.unsqueeze(1)).flatten(1)
        down = (w1b.unsqueeze(1) * w2b.unsqueeze(0)).flatten(0, 1)
        return down.t(), up * (strength * _per_rank(self.alpha, self.w1b.shape[0]))

    def delta(self) -> Tensor:
        if self.t1 is None:
            one, two = self.w1a.float() @ self.w1b.float().flatten(1), self.w2a.float() @ self.w2b.float().flatten(1)
        else:
            one, two = tucker(self.t1, self.w1a, self.w1b), tucker(self.t2, self.w2a, self.w2b)
        return one * two * _per_rank(self.alpha, self.w1b.shape[0])


@dataclass(frozen=True)
class LokrWeights(_Additive):
    """``w1``, ``w2``: one whole matrix each, or the two factors whose product it is. ``scale``: alpha / r, or 1."""

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        return self.w1[0].shape[0], self.w1[-1].shape[1], self.w2[0].shape[0], self.w2[-1].flatten(1).shape[1]

    @property
    def rank(self) -> int | None:
        if any(t.dim() > 2 for t in self.w2):
            return None  # a convolution's kernel sits between the two factors
        return _inner(self.w1) * _inner(self.w2)

    @property
    def shape(self) -> tuple[int, int]:
        a, b, c, d = self._sizes
        return a * c, b * d

    def scaled(self, strength: float) -> tuple[Tensor, Tensor]:
        """Exact: kron(A B, C D) = kron(A, C) kron(B, D); a whole matrix is itself times an identity."""
        (a, b), (c, d) = _halves(self.w1), _halves(self.w2)
        return torch.kron(b, d).t(), torch.kron(a, c) * (strength * self.scale)

    def multiplied(self) -> dict[str, Tensor]:
        """The same as two whole matrices, which need no alpha. (role -> tensor)"""
        return {"lokr_w1": _whole(self.w1) * self.scale, "lokr_w2": _whole(self.w2)}

    def delta(self) -> Tensor:
        one, two = _whole(self.w1), _whole(self.w2)
        if two.dim() == 4:
            one = one[:, :, None, None]
        return torch.kron(one, two).flatten(1) * self.scale


@dataclass(frozen=True)
class GloraWeights:
    """W a_in a_out + b_up b_down: what is added depends on the weight. A convolution's a may mix channels only.

    ``old``: in LyCORIS' first spelling of the four, which ComfyUI tells apart by shapes.
    """

    a_in: Tensor
    a_out: Tensor
    b_up: Tensor
    b_down: Tensor
    alpha: float
    old: bool = False
    rank = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.b_up.shape[0], self.b_down.flatten(1).shape[1]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a has the columns (or channels) of a weight of ``shape``."""
        columns = torch.Size(shape[1:]).numel() if len(shape) == 2 or self.old else shape[1]
        return self.a_in.shape[0] == self.a_out.shape[1] == columns

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        a_in, a_out, b_up, b_down = (
            t.float().to(weight.device) for t in (self.a_in, self.a_out, self.b_up, self.b_down)
        )
        b = (b_up @ b_down.flatten(1)).reshape(weight.shape)
        by_channel = a_in.shape[0] != weight.flatten(1).shape[1]
        mixed = torch.einsum(
            "o i ..., i r, r j -> o j ...", weight if by_channel else weight.flatten(1), a_in, a_out
        ).reshape(weight.shape)
        return weight + strength * _per_rank(self.alpha, b_down.shape[0]) * (mixed + b)


def _constrained(blocks: Tensor, constraint: float) -> Tensor:
    """``blocks`` made smaller where the norm of all their rotations together is above ``constraint``."""
    blocks = blocks.double()
    norm = (blocks - blocks.transpose(-1, -2)).norm() + 1e-8
    return blocks * (constraint / norm) if 0 < constraint < norm else blocks


def _rotations(blocks: Tensor, strength: float) -> Tensor:
    """Cayley's rotation of each block, ``strength`` of the way from the identity. (In 64 bits: it inverts.)"""
    q = blocks - blocks.transpose(-1, -2)
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return (1 - strength) * one + strength * (one + q) @ torch.linalg.inv(one - q)


@dataclass(frozen=True)
class OftWeights:
    """``constraint``: what all blocks' norm is held to, 0 for nothing. ``rescale``: a factor for each row, or None."""

    blocks: Tensor
    constraint: float = 0.0
    rescale: Tensor | None = None
    rank = None

    @property
    def shape(self) -> tuple[int, None]:
        """Rows; it fits any number of columns."""
        return self.blocks.shape[0] * self.blocks.shape[1], None

    def constrained(self) -> Tensor:
        return _constrained(self.blocks, self.constraint)

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        turn = _rotations(_constrained(self.blocks, self.constraint), strength).to(weight)
        rows = weight.reshape(turn.shape[0], turn.shape[1], -1)
        return _rescaled(torch.einsum("k n m, k n i -> k m i", turn, rows).reshape(weight.shape), self.rescale)


@dataclass(frozen=True)
class BoftWeights:
    """Butterflies: m stages of blocks, each over rows that lie further apart than in the stage before."""

    blocks: Tensor
    constraint: float = 0.0
    rescale: Tensor | None = None
    rank = None

    @property
    def shape(self) -> tuple[int, None]:
        return self.blocks.shape[1] * self.blocks.shape[2], None

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        turns = _rotations(_constrained(self.blocks, self.constraint), strength).to(weight)
        size, rows = turns.shape[-1], weight.flatten(1)
        for stage, turn in enumerate(turns):
            apart = 2**stage * size // 2
            rows = rows.unflatten(0, (-1, 2, apart)).transpose(1, 2).reshape(-1, size, rows.shape[1])
            rows = torch.einsum("b i j, b j k -> b i k", turn, rows).flatten(0, 1)
            rows = rows.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
        return _rescaled(rows.reshape(weight.shape), self.rescale)


def _rescaled(weight: Tensor, rescale: Tensor | None) -> Tensor:
    return weight if rescale is None else weight * _per(rescale, 0, weight)


def _per(values: Tensor, axis: int, weight: Tensor) -> Tensor:
    """``values`` as one for each index of ``weight``'s ``axis``."""
    return values.float().to(weight.device).reshape([-1 if i == axis else 1 for i in range(weight.dim())])


@dataclass(frozen=True)
class DiffWeights(_Additive):
    """The difference itself, as model subtraction and some trainers write it; of a norm or a bias, one number a row."""

    diff: Tensor
    rank = None

    @property
    def shape(self) -> tuple[int, int]:
        return _flat(self.diff)

    def delta(self) -> Tensor:
        return self.diff.float().reshape(self.shape)


@dataclass(frozen=True)
class SetWeights:
    """Another weight in the place of the layer's own, whatever the strength, as ComfyUI's "set" patches have it."""

    value: Tensor
    rank = None

    @property
    def shape(self) -> tuple[int, int]:
        return _flat(self.value)

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        return self.value.to(weight).reshape(weight.shape)


def _flat(tensor: Tensor) -> tuple[int, int]:
    return (tensor.shape[0], tensor.shape[1:].numel()) if tensor.dim() else (1, 1)


@dataclass(frozen=True)
class DoraWeights:
    """Direction from ``inner``, length from ``magnitude``: (N,) or (N, 1 ...) for rows, (1, C ...) for the C inputs (or
    channels) of all rows together.
    """

    inner: LowRank
    magnitude: Tensor
    rank = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def by_row(self) -> bool:
        return self.magnitude.dim() < 2 or self.magnitude.shape[0] == self.shape[0]

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """``weight`` float32; at strength 1 its rows (or inputs) have exactly the lengths ``magnitude``."""
        new = self.inner.patched(weight, 1.0)
        new = new * _per(self.magnitude, 0 if self.by_row else 1, new) / lengths(new, self.by_row).clamp(min=1e-12)
        return weight + strength * (new - weight)


def inner(weights: Weights) -> Weights:
    """What DoRA gives a length to; every other update is itself."""
    return weights.inner if isinstance(weights, DoraWeights) else weights


def lengths(weight: Tensor, by_row: bool) -> Tensor:
    """The norm of each row, or of each input (a convolution's channel), in a shape that divides ``weight``."""
    kept = 0 if by_row else 1
    return torch.linalg.vector_norm(weight, dim=[i for i in range(weight.dim()) if i != kept], keepdim=True)


LowRank = LoraWeights | LohaWeights | LokrWeights | GloraWeights  # what DoRA may give a length to
Weights = LowRank | OftWeights | BoftWeights | DiffWeights | SetWeights | DoraWeights


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(N, C kh kw) of a core (r, r, kh, kw) between a (r, N) and b (r, C)."""
    out = torch.einsum("i j k l, j r, i p -> p r k l", core.float(), b.float(), a.float())
    return out.flatten(1).contiguous()  # torch.kron wants it so


def stays_low_rank(weights: Weights) -> bool:
    """Whether a 4-bit layer takes ``weights`` into its low-rank branch: always a plain LoRA; LoHa and LoKr, whose
    exact rank is a product of ranks, where that is smaller than the layer in 16 bits.
    """
    if weights.rank is None or isinstance(weights, LoraWeights):
        return weights.rank is not None
    return low_rank_is_smaller(weights.rank, weights.shape)


def low_rank_is_smaller(rank: int, shape: tuple[int, int]) -> bool:
    """Whether a branch of ``rank`` beside 4 bits takes fewer bytes than the layer in 16 bits."""
    n, k = shape
    return 2 * rank * (n + k) < (2 - CODE_BYTES) * n * k


def _per_rank(alpha: float, rank: int) -> float:
    """alpha / rank; an update of rank 0 adds nothing, whatever its alpha."""
    return alpha / rank if rank else 0.0


def _whole(w: tuple[Tensor, ...]) -> Tensor:
    return w[0].float() if len(w) == 1 else w[0].float() @ w[1].float()


def _inner(w: tuple[Tensor, ...]) -> int:
    """The rank that `_halves` gives."""
    return min(w[0].shape[0], w[0].shape[1]) if len(w) == 1 else w[1].shape[0]


def _halves(w: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    if len(w) == 2:
        return w[0].float(), w[1].float()
    one = w[0].float()
    rows, columns = one.shape
    if rows < columns:
        return torch.eye(rows, device=one.device), one
    return one, torch.eye(columns, device=one.device)


def padded_rank(rank: int) -> int:
    return -(-rank // RANK_STEP) * RANK_STEP


def padded(weight: QuantizedTensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """``down`` and ``up`` with zeros that make the branch of ``weight`` a multiple of `RANK_STEP` with them."""
    here = getattr(weight._params, "proj_down", None)
    rank = (0 if here is None else here.shape[1]) + down.shape[1]
    pad = (0, padded_rank(rank) - rank)
    return (nn.functional.pad(down, pad), nn.functional.pad(up, pad)) if pad[1] else (down, up)


def grown(weight: QuantizedTensor, down: Tensor, up: Tensor) -> QuantizedTensor:
    """``weight`` with its branch longer by ``up`` ``down``^T, padded to a multiple of `RANK_STEP` with zeros."""
    return kernels.extend(weight, *padded(weight, down, up))
