"""The orders in which nunchaku's kernels want a matrix: reshape, permute, reshape. Both directions, byte for byte.

Each order splits the stored (rows, columns) into small dimensions; ``permute`` brings them into natural order. Held
against tensors packed by the exporter's own code (tests/data/nunchaku). Source: the nunchaku exporter's packer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import pages


@dataclass(frozen=True)
class Order:
    """``split``: shape of the stored tensor -> its small dimensions; ``natural``: the same -> shape to read it as."""

    split: Callable[..., tuple[int, ...]]
    permute: tuple[int, ...]
    natural: Callable[..., tuple[int, ...]]

    def unpack(self, stored: Tensor) -> Tensor:
        """Stored order -> natural order."""
        if not stored.numel():
            return stored.reshape(self.natural(*stored.shape))
        small = stored.reshape(self.split(*stored.shape)).permute(self.permute)
        out = pages.empty(self.natural(*stored.shape), stored.dtype, stored)
        out.view(small.shape).copy_(small)
        return out

    def pack(self, value: Tensor) -> Tensor:
        """Natural order -> stored order."""
        stored = self.natural(*value.shape)  # every order here is its own inverse on shapes
        if not value.numel():
            return value.reshape(stored)
        split = self.split(*stored)
        back = sorted(range(len(split)), key=self.permute.__getitem__)
        return value.reshape([split[i] for i in self.permute]).permute(back).reshape(stored)


def _same(*shape: int) -> tuple[int, ...]:
    return shape


def _swapped(a: int, b: int) -> tuple[int, int]:
    return b, a


# Dimensions by name, n = output rows, k = input columns.
# codes: tile of 128 rows, group of 64 columns, then 16 rows, lane row, lane column, 8-row half, 32-column half, byte
CODES = Order(lambda n, h: (n // 128, h // 32, 8, 8, 4, 2, 2, 4), (0, 2, 5, 3, 1, 6, 4, 7), _same)
# int4 scales (K/64, N): n = 128 tile + 16 a + 8 b + 2 c + d, stored as tile, group, a, c, b, d
SCALES = Order(lambda g, n: (n // 128, g, 8, 4, 2, 2), (1, 0, 2, 4, 3, 5), _same)
# bias, smooth, channel scales: the same without groups; stored positions 0, 1, 2, 3 are 0, 1, 8, 9
VECTOR = Order(lambda n: (n // 128, 8, 4, 2, 2), (0, 1, 3, 2, 4), _same)
# nvfp4 scales, stored (K/16, N), natural (N, K/16): n = 128 tile + 32 sp + 8 q + l, group = 4 kt + kk
FP4_SCALES = Order(lambda g, n: (n // 128, g // 4, 8, 4, 4, 4), (0, 4, 3, 2, 1, 5), _swapped)
# branch factors: 16 x 16 tiles
DOWN = Order(lambda k, r: (k // 16, r // 16, 8, 4, 2, 2, 2), (0, 5, 3, 6, 1, 4, 2), _same)
UP = Order(lambda n, r: (n // 16, r // 16, 8, 4, 2, 2, 2), (0, 4, 2, 1, 5, 3, 6), _same)


def awq_codes(stored: Tensor) -> Tensor:
    """I32 (N/4, K/2) -> (N, K) uint8 codes, 0..15.

    As 16-bit words: 4 rows of a 64-column tile side by side, 16 words each; nibble j of word i of half h is column
    32 h + 8 j + i.
    """
    n, k = stored.shape[0] * 4, stored.shape[1] * 2
    words = stored.contiguous().view(torch.int16).reshape(n // 4, k // 64, 4, 2, 8).permute(0, 2, 1, 3, 4)
    nibbles = [(words >> shift) & 15 for shift in (0, 4, 8, 12)]
    return torch.stack(nibbles, -2).reshape(n, k).to(torch.uint8)


def pack_awq_codes(codes: Tensor) -> Tensor:
    """The inverse of `awq_codes`."""
    n, k = codes.shape
    nibbles = codes.to(torch.int32).reshape(n, k // 64, 2, 4, 8).unbind(-2)
    words = sum(c << shift for c, shift in zip(nibbles, (0, 4, 8, 12), strict=True))
    words = torch.where(words > 32767, words - 65536, words).to(torch.int16)
    tiles = words.reshape(n // 4, 4, k // 64, 16).permute(0, 2, 1, 3).reshape(n // 4, k)
    return tiles.contiguous().view(torch.int32)
