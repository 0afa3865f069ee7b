"""What one layer of a LoRA file holds, one small class a kind; every class says what it adds to the layer's weight.

    kind    tensors                                      adds, times strength                             rank
    lora    down (r, K), up (N, r) [, mid]               alpha/r up down                                  r
    loha    w1a (N, r), w1b (r, K), w2a, w2b             alpha/r (w1a w1b) * (w2a w2b), by element        r^2
    lokr    w1 (a, b), w2 (c, d), each whole or a b      alpha/r kron(w1, w2); no alpha when both whole   below
    diff    diff (N, K)                                  diff                                             -
    dora    one of the above, magnitude (N, 1)|(1, K)    m (W + added) / ||W + added|| - W, row or column -

K counts a convolution's kernel too: (N, C, kh, kw) is (N, C kh kw). Sources: LyCORIS; kohya sd-scripts; PEFT (DoRA).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        return self._wide().float().t(), self.up.flatten(1).float() * (strength * self.alpha / self.rank)

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
        return down.t(), up * (strength * self.alpha / self.w1b.shape[0])

    def delta(self) -> Tensor:
        if self.t1 is None:
            one, two = self.w1a.float() @ self.w1b.float().flatten(1), self.w2a.float() @ self.w2b.float().flatten(1)
        else:
            one, two = (
                torch.einsum("i j k l, j r, i p -> p r k l", t.float(), b.float(), a.float()).flatten(1)
                for t, b, a in ((self.t1, self.w1b, self.w1a), (self.t2, self.w2b, self.w2a))
            )
        return one * two * (self.alpha / self.w1b.shape[0])


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

    def delta(self) -> Tensor:
        one, two = _whole(self.w1), _whole(self.w2)
        if two.dim() == 4:
            one = one[:, :, None, None]
        return torch.kron(one, two).flatten(1) * self.scale


@dataclass(frozen=True)
class DiffWeights(_Additive):
    """The difference itself, as model subtraction and some trainers write it."""

    diff: Tensor
    rank = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.diff.shape[0], self.diff[0].numel()

    def delta(self) -> Tensor:
        return self.diff.float().flatten(1)


@dataclass(frozen=True)
class DoraWeights:
    """Direction from ``inner``, length from ``magnitude``: (N,) or (N, 1) for rows, (1, K) for columns."""

    inner: LoraWeights | LohaWeights | LokrWeights
    magnitude: Tensor
    rank = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """``weight`` float32; at strength 1 its rows (or columns) have exactly the lengths ``magnitude``."""
        new = self.inner.patched(weight, 1.0).flatten(1)
        m = self.magnitude.float().to(new.device).reshape(-1)
        by_row = self.magnitude.shape[0] == new.shape[0]
        m = m.reshape(-1, 1) if by_row else m.reshape(1, -1).repeat_interleave(new.shape[1] // m.numel(), 1)
        new = new * m / new.norm(dim=1 if by_row else 0, keepdim=True).clamp(min=1e-12)
        return weight + strength * (new.reshape(weight.shape) - weight)


Weights = LoraWeights | LohaWeights | LokrWeights | DiffWeights | DoraWeights


def stays_low_rank(weights: Weights) -> bool:
    """Whether a 4-bit layer takes ``weights`` into its low-rank branch: always a plain LoRA; LoHa and LoKr, whose
    exact rank is a product of ranks, where that is smaller than the layer in 16 bits.
    """
    if weights.rank is None or isinstance(weights, LoraWeights):
        return weights.rank is not None
    n, k = weights.shape
    return 2 * weights.rank * (n + k) < (2 - CODE_BYTES) * n * k


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
