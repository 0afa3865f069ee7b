"""A GGUF file's header, walked before the library reads it: the library believes every count and length it finds.

    magic GGUF, u32 version, u64 tensors, u64 values
    value    u64 length and name; u32 type; a number, a string (u64 length and bytes), or an array (u32 type, u64 count)
    tensor   u64 length and name; u32 dimensions; u64 each; u32 type; u64 offset from the data, which is aligned

Source: the GGUF specification, version 3 (ggml, docs/gguf.md). Numbers are little-endian here.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError

REPAIR = "Download the file again, or convert it with a newer tool"
MAX_TENSORS, MAX_VALUES, MAX_ITEMS = 50_000, 20_000, 200_000  # models have some thousands, some dozens, some dozens
MAX_NAME, MAX_TEXT, MAX_DIMENSIONS = 2**10, 2**22, 8
NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type -> bytes
UINT32, STRING, ARRAY = 4, 8, 9
ARCHITECTURE, ALIGNMENT = "general.architecture", "general.alignment"
# Architectures of text encoders: their vocabularies are the only long arrays that an honest file holds
TEXT = ("t5", "t5encoder", "llama", "qwen2", "qwen2vl", "qwen3", "gemma", "gemma2", "gemma3", "clip")


class _Walk:
    """A place in a file of ``size`` bytes. Raises ValueError at its end, and for lengths that no header has."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    @property
    def left(self) -> int:
        return self.size - self.file.tell()

    def number(self, kind: str = "Q") -> int:
        raw = self.file.read(struct.calcsize(kind))
        if len(raw) < struct.calcsize(kind):
            raise ValueError("it is truncated")
        return struct.unpack(f"<{kind}", raw)[0]

    def skip(self, nbytes: int) -> None:
        if nbytes > self.left:
            raise ValueError("it is truncated")
        self.file.seek(nbytes, 1)

    def text(self, limit: int) -> str:
        length = self.number()
        if length > min(limit, self.left):
            raise ValueError(f"its header holds a text of {length} bytes")
        return self.file.read(length).decode("utf-8")  # UnicodeDecodeError is a ValueError


def check(path: Path, sizes: Mapping[int, tuple[int, int]]) -> None:
    """Raises CheckpointError for a file that is not a whole GGUF file of a model of pictures. ``sizes``: tensor type ->
    (weights, bytes) of a block.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        walk = _Walk(f, size)
        if f.read(4) != b"GGUF":
            raise CheckpointError(path.name, "not a GGUF file", REPAIR)
        try:
            if not walk.number("I") & 0xFFFF:
                raise ValueError("its numbers are big-endian, which nothing here reads")
            tensors, values = walk.number(), walk.number()
            if tensors > min(MAX_TENSORS, walk.left // 24) or values > min(MAX_VALUES, walk.left // 12):
                raise ValueError(f"its header lists {tensors} tensors and {values} values")
            alignment = _values(walk, values, path)
            _tensors(walk, tensors, alignment, sizes)
        except ValueError as e:
            raise CheckpointError(path.name, f"not a whole GGUF file ({str(e)[:200]})", REPAIR) from e


def _values(walk: _Walk, count: int, path: Path) -> int:
    """Walks the values; returns the alignment of the data."""
    alignment, items = 32, 0
    for _ in range(count):
        name, kind = walk.text(MAX_NAME), walk.number("I")
        if name == ALIGNMENT and kind == UINT32:
            alignment = walk.number("I")
            if alignment < 1 or alignment & (alignment - 1):
                raise ValueError(f"its alignment is {alignment}")
        elif kind in NUMBERS:
            walk.skip(NUMBERS[kind])
        elif kind == STRING:
            text = walk.text(MAX_TEXT)
            if name == ARCHITECTURE and text in TEXT:
                what = f"it is a text encoder ({text})"
                raise CheckpointError(path.name, what, "Load it with ComfyUI-GGUF's CLIP loader")
        elif kind == ARRAY:
            inner, length = walk.number("I"), walk.number()
            items += length
            if items > MAX_ITEMS:
                raise ValueError(f"its header holds arrays of {items} values")
            if inner in NUMBERS:
                walk.skip(NUMBERS[inner] * length)
            elif inner == STRING:
                for _ in range(length):
                    walk.text(MAX_TEXT)
            else:
                raise ValueError(f"{name} is an array of {'arrays' if inner == ARRAY else f'type {inner}'}")
        else:
            raise ValueError(f"{name} is of type {kind}")
    return alignment


def _tensors(walk: _Walk, count: int, alignment: int, sizes: Mapping[int, tuple[int, int]]) -> None:
    ends, total = [], 0
    for _ in range(count):
        name, dimensions = walk.text(MAX_NAME), walk.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = [walk.number() for _ in range(dimensions)]
        kind, offset = walk.number("I"), walk.number()
        if kind not in sizes:
            raise ValueError(f"{name} is of type {kind}, unknown to this version")
        weights, nbytes = sizes[kind]
        need = -(-prod(shape) // weights) * nbytes
        ends.append((offset + need, name))
        total += need
    start = -(-walk.file.tell() // alignment) * alignment
    room = max(0, walk.size - start)
    if ends and max(ends)[0] > room:
        raise ValueError(f"it is truncated: {max(ends)[1]} ends behind it")
    if total > room:
        raise ValueError("its tensors lie over each other")
