"""GGUF files of diffusion models: Q4_0 to Q8_0 and K-quants, kept as they are. Read through the `gguf` library.

A tensor is a quantized linear when its type is one of quant/gguf_blocks.py and it has two dimensions; every other
tensor is dense: floats as they are, small or odd-shaped quantized ones made dense.

The library believes every count and length that it finds, so the header is walked first:

    magic GGUF, u32 version, u64 tensors, u64 values
    value    u64 length and name; u32 type; a number, a string (u64 length and bytes), or an array (u32 type, u64 count)
    tensor   u64 length and name; u32 dimensions; u64 each; u32 type; u64 offset from the data, which is aligned

Source: the GGUF specification, version 3 (ggml, docs/gguf.md). Numbers are little-endian here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ...quant.gguf_blocks import BLOCKS, BY_NUMBER, decode
from ...quant.weight_only import WeightOnly
from .. import lazy
from ..errors import CheckpointError
from .stored import StoredLayer

TITLE = "GGUF"
ENDING = ".gguf"
DENSE = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 24: torch.int8, 26: torch.int32}
ORIGINAL = "comfy.gguf.orig_shape."
REPAIR = "Download the file again, or convert it with a newer tool"
MAX_TENSORS, MAX_VALUES, MAX_ITEMS = 50_000, 20_000, 200_000  # models have some thousands, some dozens, some dozens
MAX_NAME, MAX_TEXT, MAX_DIMENSIONS = 2**10, 2**22, 8
NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type -> bytes
UINT32, STRING, ARRAY = 4, 8, 9
ARCHITECTURE, ALIGNMENT = "general.architecture", "general.alignment"
# Architectures of text encoders: their vocabularies are the only long arrays that an honest file holds
TEXT = ("t5", "t5encoder", "llama", "qwen2", "qwen2vl", "qwen3", "gemma", "gemma2", "gemma3", "clip")


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ENDING


def open_file(path: Path):
    """The library's reader. Raises CheckpointError for a missing library and for whatever is wrong with the file."""
    if not path.is_file():
        raise CheckpointError(path.name, "there is no such file", "Choose one from the list, or check the folder")
    try:
        import gguf
    except ImportError as e:
        remedy = "Install it beside ComfyUI: pip install gguf"
        raise CheckpointError(path.name, "GGUF files need the library gguf, which is not installed", remedy) from e
    check_header(path, {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()})
    with reading(path):
        return gguf.GGUFReader(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """The library raises whatever broken bytes lead to: here it becomes one sentence."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, OSError, AttributeError) as e:
        what = f"not a whole GGUF file ({str(e).splitlines()[0][:100] if str(e) else type(e).__name__})"
        raise CheckpointError(path.name, what, REPAIR) from e


def architecture(reader) -> str:
    field = reader.get_field("general.architecture")
    return "" if field is None else str(field.contents())


def shape_of(reader, tensor) -> tuple[int, ...]:
    """A tensor's shape as torch has it; the format stores it the other way round."""
    field = reader.get_field(ORIGINAL + tensor.name)
    if field is not None:
        return tuple(int(x) for x in field.contents())
    return tuple(int(x) for x in reversed(tensor.shape))


def kind(tensor) -> str:
    """q4_k and so on, or a float's name."""
    number = int(tensor.tensor_type)
    return BY_NUMBER[number].id if number in BY_NUMBER else tensor.tensor_type.name


def stays(tensor, shape: tuple[int, ...]) -> bool:
    """Whether ``tensor`` is a linear that keeps its codes."""
    block = BY_NUMBER.get(int(tensor.tensor_type))
    return block is not None and len(shape) == 2 and tensor.name.endswith(".weight") and shape[1] % block.weights == 0


def load(path: Path) -> tuple[dict[str, StoredLayer], dict[str, Tensor], dict[str, str]]:
    """(layers, dense tensors, metadata) of a whole file. Raises CheckpointError naming the layer."""
    reader = open_file(path)
    return *take(reader, path, reader.tensors), about(reader, path)


def about(reader, path: Path) -> dict[str, str]:
    """The metadata that is kept."""
    with reading(path):
        return {"general.architecture": architecture(reader)}


def take(
    reader, path: Path, tensors: Iterable, values: bool = True
) -> tuple[dict[str, StoredLayer], dict[str, Tensor]]:
    """(layers, dense tensors) of some of the reader's ``tensors``; on torch's meta device without ``values``.

    Not through the library's map of the file: a page of it that was read once stays counted. Raises CheckpointError
    naming the layer.
    """
    layers, dense = {}, {}
    with path.open("rb") as file:
        for t in tensors:
            try:
                data = _bytes(t, file) if values else torch.empty(int(t.n_bytes), dtype=torch.uint8, device="meta")
                _put(t, data, shape_of(reader, t), layers, dense)
            except (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, OSError) as e:
                raise CheckpointError(path.name, str(e)[:200], REPAIR, t.name[:200]) from e
    return layers, dense


def _bytes(t, file: BinaryIO) -> Tensor:
    data = lazy.empty((int(t.n_bytes),), torch.uint8)
    file.seek(int(t.data_offset))
    if file.readinto(memoryview(data.numpy())) != len(data):
        raise ValueError("the file ends before it")
    return data


def _put(t, data: Tensor, shape: tuple[int, ...], layers: dict, dense: dict) -> None:
    number = int(t.tensor_type)
    if any(s < 0 or s >= 2**31 for s in shape):
        raise ValueError(f"its shape {shape} is no shape")
    if prod(shape) != int(t.n_elements):
        raise ValueError(f"its shape {shape} is not that of its {int(t.n_elements)} values")
    if number in DENSE:
        dense[t.name] = data.view(DENSE[number]).reshape(shape)
        return
    if number not in BY_NUMBER:
        known = ", ".join(BLOCKS)
        raise ValueError(f"its type {t.tensor_type.name} is unknown to this version, which reads {known}")
    block = BY_NUMBER[number]
    data = data.reshape(-1, t.data.shape[-1])
    if stays(t, shape):
        layers[t.name.removesuffix(".weight")] = StoredLayer(WeightOnly(block.id, shape, data), form=block.id)
    else:
        dense[t.name] = decode(block.id, data).reshape(shape).to(torch.float16)


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


def check_header(path: Path, sizes: Mapping[int, tuple[int, int]]) -> None:
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
