"""GGUF's block formats as torch: (..., bytes) uint8 -> (..., weights) float32, on any device.

Each block is a few float16 scales and packed codes; K-quants are super-blocks of 256 with 6-bit or 4-bit scales.
Held against the `gguf` library's own numpy code, value for value. Source: ggml-quants.h (block structs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _f16(b: Tensor) -> Tensor:
    return b.contiguous().view(torch.float16).float()


def _nibbles(b: Tensor) -> Tensor:
    """(..., n) bytes -> (..., 2n): all low nibbles, then all high ones."""
    return torch.cat((b & 15, b >> 4), -1)


def _bits(b: Tensor) -> Tensor:
    """(..., 4) bytes of 32 flags -> (..., 32), lowest bit first."""
    shifts = torch.arange(8, device=b.device, dtype=torch.uint8)
    return ((b.unsqueeze(-1) >> shifts) & 1).flatten(-2)


def _q4_0(b: Tensor) -> Tensor:
    return (_nibbles(b[..., 2:]).float() - 8) * _f16(b[..., :2])


def _q4_1(b: Tensor) -> Tensor:
    return _nibbles(b[..., 4:]).float() * _f16(b[..., :2]) + _f16(b[..., 2:4])


def _q5_0(b: Tensor) -> Tensor:
    q = _nibbles(b[..., 6:]) | (_bits(b[..., 2:6]) << 4)
    return (q.float() - 16) * _f16(b[..., :2])


def _q5_1(b: Tensor) -> Tensor:
    q = _nibbles(b[..., 8:]) | (_bits(b[..., 4:8]) << 4)
    return q.float() * _f16(b[..., :2]) + _f16(b[..., 2:4])


def _q8_0(b: Tensor) -> Tensor:
    return b[..., 2:].contiguous().view(torch.int8).float() * _f16(b[..., :2])


def _scales_k4(b: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes of 6-bit pairs -> 8 scales and 8 minima."""
    low, mid, high = b[..., :4], b[..., 4:8], b[..., 8:]
    scale = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), -1)
    minimum = torch.cat((mid & 63, (high >> 4) | ((mid >> 2) & 48)), -1)
    return scale.float(), minimum.float()


def _low_high(b: Tensor) -> Tensor:
    """(..., 128) bytes -> (..., 8, 32): of every 32 bytes the low nibbles, then the high ones."""
    return _nibbles(b.unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)


def _with_minimum(b: Tensor, q: Tensor) -> Tensor:
    scale, minimum = _scales_k4(b[..., 4:16])
    d, dmin = _f16(b[..., :2]) * scale, _f16(b[..., 2:4]) * minimum
    return (q.float() * d.unsqueeze(-1) - dmin.unsqueeze(-1)).flatten(-2)


def _q4_k(b: Tensor) -> Tensor:
    return _with_minimum(b, _low_high(b[..., 16:]))


def _q5_k(b: Tensor) -> Tensor:
    shifts = torch.arange(8, device=b.device, dtype=torch.uint8).unsqueeze(-1)
    high = (b[..., 16:48].unsqueeze(-2) >> shifts) & 1
    return _with_minimum(b, _low_high(b[..., 48:]) | (high << 4))


def _pairs(b: Tensor) -> Tensor:
    """(..., 64) bytes of 2-bit codes -> (..., 8, 32), planes of each 32 bytes in turn."""
    shifts = torch.arange(0, 8, 2, device=b.device, dtype=torch.uint8).unsqueeze(-1)
    return ((b.unflatten(-1, (-1, 1, 32)) >> shifts) & 3).flatten(-3, -2)


def _q6_k(b: Tensor) -> Tensor:
    low = _nibbles(b[..., :128].unflatten(-1, (2, 64))).unflatten(-1, (4, 32)).flatten(-3, -2)
    q = (low | (_pairs(b[..., 128:192]) << 4)).view(torch.int8) - 32
    scale = b[..., 192:208].contiguous().view(torch.int8).float() * _f16(b[..., 208:])
    return (q.flatten(-2).unflatten(-1, (16, 16)).float() * scale.unsqueeze(-1)).flatten(-2)


def _q2_k(b: Tensor) -> Tensor:
    d = (_f16(b[..., 80:82]) * (b[..., :16] & 15).float()).unsqueeze(-1)
    dmin = (_f16(b[..., 82:]) * (b[..., :16] >> 4).float()).unsqueeze(-1)
    return (d * _pairs(b[..., 16:80]).flatten(-2).unflatten(-1, (16, 16)).float() - dmin).flatten(-2)


def _q3_k(b: Tensor) -> Tensor:
    packed = b[..., 96:108]
    low = torch.cat((packed[..., :8] & 15, packed[..., :8] >> 4), -1)
    shifts = torch.arange(0, 8, 2, device=b.device, dtype=torch.uint8).unsqueeze(-1)
    high = ((packed[..., 8:].unsqueeze(-2) >> shifts) & 3).flatten(-2)
    scale = ((low | (high << 4)).view(torch.int8) - 32).float() * _f16(b[..., 108:])
    flags = torch.arange(8, device=b.device, dtype=torch.uint8).unsqueeze(-1)
    missing = (((b[..., :32].unsqueeze(-2) >> flags) & 1) ^ 1) << 2
    q = _pairs(b[..., 32:96]).view(torch.int8) - missing.view(torch.int8)
    return (q.flatten(-2).unflatten(-1, (16, 16)).float() * scale.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class Block:
    """``number``: GGUF's tensor type; a block of ``weights`` weights takes ``nbytes``."""

    id: str
    number: int
    weights: int
    nbytes: int
    decode: Callable[[Tensor], Tensor]

    @property
    def bits(self) -> float:
        return 8 * self.nbytes / self.weights


BLOCKS: dict[str, Block] = {
    b.id: b
    for b in (
        Block("q4_0", 2, 32, 18, _q4_0), Block("q4_1", 3, 32, 20, _q4_1), Block("q5_0", 6, 32, 22, _q5_0),
        Block("q5_1", 7, 32, 24, _q5_1), Block("q8_0", 8, 32, 34, _q8_0), Block("q2_k", 10, 256, 84, _q2_k),
        Block("q3_k", 11, 256, 110, _q3_k), Block("q4_k", 12, 256, 144, _q4_k), Block("q5_k", 13, 256, 176, _q5_k),
        Block("q6_k", 14, 256, 210, _q6_k),
    )
}  # fmt: skip
BY_NUMBER = {b.number: b for b in BLOCKS.values()}


def decode(id: str, data: Tensor) -> Tensor:
    """(N, blocks * nbytes) uint8 -> (N, K) float32."""
    block = BLOCKS[id]
    return block.decode(data.unflatten(-1, (-1, block.nbytes))).flatten(-2)
