"""Self-attention with fewer keys and values: neighbouring ones are averaged, queries stay as they are.

Every query still looks at the whole picture, coarsely. The average is taken of the layer's input, so keys and values
of the places that are gone are never projected.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from .op import Attention, AttentionOp, Pair

# share of the keys that go -> the area that becomes one
KERNELS = ((1 / 2, (1, 2)), (3 / 4, (2, 2)), (15 / 16, (4, 4)))


def kernel(strength: float) -> Pair:
    """The smallest area that saves ``strength`` of the keys; the largest where none does."""
    return next((area for share, area in KERNELS if strength <= share), KERNELS[-1][1])


def pooled(tokens: Tensor, size: Pair, area: Pair) -> Tensor:
    """``tokens`` (B, H W, C) -> (B, ceil(H / a) ceil(W / b), C); at the edges the mean of what is there."""
    h, w = size
    maps = tokens.unflatten(1, (h, w)).movedim(3, 1)
    fewer = functional.avg_pool2d(maps, area, ceil_mode=True, count_include_pad=False)
    return fewer.flatten(2).transpose(1, 2)


def saved(attention: Attention, strength: float) -> int:
    a, b = kernel(strength)
    gone = attention.tokens - -(-attention.size[0] // a) * -(-attention.size[1] // b)
    return 4 * gone * attention.width**2 + 4 * attention.tokens * gone * attention.width


OP = AttentionOp("pool", "keys and values averaged over neighbours", saved)
