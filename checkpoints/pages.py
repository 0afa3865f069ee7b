"""Memory of its own for big tensors: given back to the system the moment a tensor goes.

The C library keeps freed blocks of up to 32 MiB and reuses them only where they fit; unpacking and joining thousands of
layers leaves a fifth of a file's size in such holes.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

SMALL = 2**20  # below this the ordinary allocator


def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
    """An uninitialised or zero CPU tensor; one without values where ``like`` has none."""
    if like is not None and like.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALL:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).reshape(shape)
