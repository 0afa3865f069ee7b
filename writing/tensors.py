"""Safetensors files, one tensor in memory at a time, the same bytes for the same input. Source: the format's README.

    8 bytes         length of the header, little-endian
    header          JSON: "__metadata__" sorted, then name -> dtype, shape, data_offsets; spaces up to a multiple of 8
    tensors         little-endian and without gaps, the dtypes in the order of the library's own writer, then by name

The library's writer needs all tensors at once, writes metadata in a random order, and leaves a file under a name of its
own when it is killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .room import check_free
from .whole import whole

# The last is written first: larger elements, which then stand at multiples of their size.
DTYPES = {
    getattr(torch, torch_name): name
    for torch_name, name in (
        ("bool", "BOOL"), ("float4_e2m1fn_x2", "F4"), ("uint8", "U8"), ("int8", "I8"), ("float8_e5m2", "F8_E5M2"),
        ("float8_e4m3fn", "F8_E4M3"), ("float8_e8m0fnu", "F8_E8M0"), ("float8_e4m3fnuz", "F8_E4M3FNUZ"),
        ("float8_e5m2fnuz", "F8_E5M2FNUZ"), ("int16", "I16"), ("uint16", "U16"), ("float16", "F16"),
        ("bfloat16", "BF16"), ("int32", "I32"), ("uint32", "U32"), ("float32", "F32"), ("complex64", "C64"),
        ("float64", "F64"), ("int64", "I64"), ("uint64", "U64"),
    )
    if hasattr(torch, torch_name)
}  # fmt: skip
ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}
BLOCK = 2**26


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of their values."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def save(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], overwrite: bool = True, durable: bool = True
) -> Path:
    """Writes a safetensors file, if there is room for it. Raises WriteError."""
    names = sorted(tensors, key=lambda n: (-ORDER[tensors[n].dtype], n))
    header, total = _header({n: tensors[n] for n in names}, metadata)
    check_free(path, len(header) + total, "")
    with whole(path, overwrite, durable) as f:
        f.write(header)
        for name in names:
            for block in blocks(tensors[name]):
                f.write(block)
    return path


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """(the header with its length, bytes that come after it)."""
    entries: dict[str, dict] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, t in tensors.items():
        start, end = end, end + t.numel() * t.element_size()
        shape = [*t.shape[:-1], 2 * t.shape[-1]] if DTYPES[t.dtype] == "F4" else list(t.shape)
        entries[name] = {"dtype": DTYPES[t.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in the order of its elements, some at a time."""
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    data = memoryview(flat.view(torch.uint8).numpy())
    yield from (data[start : start + BLOCK] for start in range(0, len(data), BLOCK))
