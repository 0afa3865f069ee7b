"""4-bit codes <-> bytes. Layout only: nothing here rounds or scales.

natural order      bytes (..., K/2) int8; the low nibble is the even column.
                   signed codes are two's complement [-8, 7], unsigned codes [0, 15].

                   Worked example, N = 2, K = 8:
                     codes  [[ 1, -2,  3, -4,  5, -6,  7, -8],     bytes  [[0xE1, 0xC3, 0xA5, 0x87],
                             [ 0,  1,  2,  3, -1, -2, -3, -4]]             [0x10, 0x32, 0xEF, 0xCD]]
                   column 0 is 1 = 0x1 and column 1 is -2 = 0xE, so the first byte is 0xE1.

tile-packed order  comfy-kitchen's "kitchen_tile_packed_w4a4", N % 128 == 0 and K % 64 == 0:
                     weight (N/128, K/64, 32, 128) int8: tile of 128 rows, group of 64 columns, quad of 4 rows,
                            then the 4 rows' 32 bytes one after another
                     scales (N/128, K/64, 128)
                     up     (N/128, R, 128)
                   Worked example for the two rows above, alone at rows 0 and 1 of their tile and columns 0..7:
                     weight[0, 0, 0,  0: 4] = E1 C3 A5 87     (row 0: bytes  0..31 of the quad)
                     weight[0, 0, 0, 32:36] = 10 32 EF CD     (row 1: bytes 32..63)

Sources: comfy-kitchen backends/eager/svdquant.py (both orders).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from .schemes import GROUP

TILE_N, QUAD = 128, 4


class Packed:
    """What dataclasses of an (N, K) weight with two codes a byte share. ``SIDES``: fields in the compute dtype."""

    SIDES: ClassVar[tuple[str, ...]] = ("proj_down", "proj_up")
    qweight: Tensor
    proj_down: Tensor | None
    proj_up: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.qweight.shape[0], self.qweight.shape[1] * 2

    @property
    def rank(self) -> int:
        return 0 if self.proj_down is None else self.proj_down.shape[-1]

    def to(self, dtype: torch.dtype) -> Packed:
        """The same weight with its side tensors in ``dtype``; codes stay as they are."""
        sides = {n: getattr(self, n) for n in self.SIDES}
        return replace(self, **{n: None if t is None else t.to(dtype) for n, t in sides.items()})


def pack(codes: Tensor) -> Tensor:
    """(..., K) integer codes in [-8, 15] -> (..., K/2) int8. Raises ValueError if K is odd."""
    if codes.shape[-1] % 2:
        raise ValueError(f"4-bit codes are packed in pairs: the last dimension must be even, got {codes.shape[-1]}")
    nibbles = codes.to(torch.uint8) & 0x0F
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).view(torch.int8)


def unpack_unsigned(packed: Tensor) -> Tensor:
    """(..., K/2) int8 -> (..., K) uint8 codes in [0, 15]."""
    nibbles = packed.view(torch.uint8)
    return torch.stack((nibbles & 0x0F, nibbles >> 4), -1).flatten(-2)


def unpack_signed(packed: Tensor) -> Tensor:
    """(..., K/2) int8 -> (..., K) int8 codes in [-8, 7]."""
    # arithmetic shifts carry the sign of a nibble at the top of its byte
    return torch.stack(((packed << 4) >> 4, packed >> 4), -1).flatten(-2)


def tiles_fit(n: int, k: int) -> bool:
    """Whether an (N, K) weight can be tile-packed."""
    return n % TILE_N == 0 and k % GROUP == 0


def tile_weight(packed: Tensor) -> Tensor:
    """(N, K/2) natural bytes -> (N/128, K/64, 32, 128) tile-packed bytes."""
    n, half = packed.shape
    if not tiles_fit(n, 2 * half):
        raise ValueError(f"tile packing needs N % {TILE_N} == 0 and K % {GROUP} == 0, got N={n}, K={2 * half}")
    tiles = packed.reshape(n // TILE_N, TILE_N // QUAD, QUAD, 2 * half // GROUP, GROUP // 2)
    return tiles.permute(0, 3, 1, 2, 4).reshape(n // TILE_N, 2 * half // GROUP, TILE_N // QUAD, QUAD * GROUP // 2)


def untile_weight(tiles: Tensor) -> Tensor:
    """(N/128, K/64, 32, 128) tile-packed bytes -> (N, K/2) natural bytes."""
    n, g = tiles.shape[0] * TILE_N, tiles.shape[1]
    rows = tiles.reshape(n // TILE_N, g, TILE_N // QUAD, QUAD, GROUP // 2)
    return rows.permute(0, 2, 3, 1, 4).reshape(n, g * GROUP // 2)


def tile_scales(scales: Tensor) -> Tensor:
    """(K/64, N) -> (N/128, K/64, 128)."""
    g, n = scales.shape
    return scales.reshape(g, n // TILE_N, TILE_N).transpose(0, 1).contiguous()


def untile_scales(tiles: Tensor) -> Tensor:
    """(N/128, K/64, 128) -> (K/64, N)."""
    return tiles.transpose(0, 1).reshape(tiles.shape[1], -1)


def tile_up(proj_up: Tensor) -> Tensor:
    """(N, R) -> (N/128, R, 128)."""
    n, r = proj_up.shape
    return proj_up.reshape(n // TILE_N, TILE_N, r).transpose(1, 2).contiguous()


def untile_up(tiles: Tensor) -> Tensor:
    """(N/128, R, 128) -> (N, R)."""
    return tiles.transpose(1, 2).reshape(-1, tiles.shape[1])
