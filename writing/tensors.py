"""Safetensors files, one tensor in memory at a time, the same bytes for the same input. Source: the format's README.

What a file will hold is said first: names, dtypes and shapes make the header, and then every tensor has its place.

    8 bytes         length of the header, little-endian
    header          JSON: "__metadata__" sorted, then name -> dtype, shape, data_offsets; spaces up to a multiple of 8
    tensors         little-endian and without gaps, the dtypes in the order of the library's own writer, then by name

The library's writer needs all tensors at once, writes metadata in a random order, and leaves a file under a name of its
own when it is killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO

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


Entry = tuple[torch.dtype, tuple[int, ...]]


def entry(tensor: Tensor) -> Entry:
    """What `writing` must know of a tensor."""
    return tensor.dtype, tuple(tensor.shape)


class Writer:
    """Takes the tensors of a file, each once, in any order: see `writing`. ``names``: in the order of the file."""

    def __init__(self, name: str, file: BinaryIO, entries: Mapping[str, Entry], places: Mapping[str, int]):
        self.names = list(places)
        self._name, self._file, self._entries, self._left = name, file, entries, dict(places)

    def write_all(self, tensors: Mapping[str, Tensor]) -> None:
        """`write` for every announced one."""
        for name in self.names:
            self.write(name, tensors[name])

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError for a tensor that was not announced, is there already, or is another than announced."""
        if name not in self._left:
            known = "was written already" if name in self._entries else "was not announced"
            raise ValueError(f"{self._name}: the tensor {name} {known}")
        if entry(tensor) != self._entries[name]:
            want, got = (f"{dtype} {list(shape)}" for dtype, shape in (self._entries[name], entry(tensor)))
            raise ValueError(f"{self._name}: the tensor {name} was announced as {want} and is {got}")
        start = self._left.pop(name)
        if self._file.tell() != start:
            self._file.seek(start)
        for block in blocks(tensor):
            self._file.write(block)

    def finish(self) -> None:
        """Raises ValueError unless every tensor is there."""
        if self._left:
            raise ValueError(f"{self._name}: {len(self._left)} tensors are missing, {next(iter(self._left))} first")


@contextmanager
def writing(
    path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], overwrite: bool = True, durable: bool = True
) -> Iterator[Writer]:
    """Hands out the `Writer` of a safetensors file that is at ``path`` when the block has ended with all ``entries``
    written, and not at all when anything else happened. Raises WriteError, also before the block where there is no
    room for all of it; ValueError, see `Writer`.
    """
    names = sorted(entries, key=lambda n: (-ORDER[entries[n][0]], n))
    header, sizes = _header({n: entries[n] for n in names}, metadata)
    check_free(path, len(header) + sum(sizes), "")
    places, at = {}, len(header)
    for name, size in zip(names, sizes, strict=True):
        places[name], at = at, at + size
    with whole(path, overwrite, durable) as f:
        f.write(header)
        writer = Writer(path.name, f, entries, places)
        yield writer
        writer.finish()


def entries(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """What `writing` must know of ``tensors``, which may be without values (on torch's meta device)."""
    return {name: entry(t) for name, t in tensors.items()}


def nbytes(entries: Mapping[str, Entry]) -> int:
    """Bytes of their values."""
    return sum(prod(shape) * dtype.itemsize for dtype, shape in entries.values())


def save(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], overwrite: bool = True, durable: bool = True
) -> Path:
    """Writes a safetensors file, if there is room for it. Raises WriteError."""
    with writing(path, entries(tensors), metadata, overwrite, durable) as writer:
        writer.write_all(tensors)
    return path


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """(the header with its length, bytes of each tensor)."""
    listed: dict[str, dict] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    sizes, end = [], 0
    for name, (dtype, shape) in entries.items():
        sizes.append(prod(shape) * dtype.itemsize)
        start, end = end, end + sizes[-1]
        logical = [*shape[:-1], 2 * shape[-1]] if DTYPES[dtype] == "F4" else list(shape)
        listed[name] = {"dtype": DTYPES[dtype], "shape": logical, "data_offsets": [start, end]}
    text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, sizes


def blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in the order of its elements, some at a time."""
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    data = memoryview(flat.view(torch.uint8).numpy())
    yield from (data[start : start + BLOCK] for start in range(0, len(data), BLOCK))
