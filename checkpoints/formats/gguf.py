"""GGUF files of diffusion models: Q4_0 to Q8_0 and K-quants, kept as they are. Read through the `gguf` library.

A tensor is a quantized linear when its type is one of quant/gguf_blocks.py and it has two dimensions; every other
tensor is dense: floats as they are, small or odd-shaped quantized ones made dense. Source: the GGUF specification.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ...quant.gguf_blocks import BLOCKS, BY_NUMBER, decode
from ...quant.weight_only import WeightOnly
from .. import pages
from ..errors import CheckpointError
from . import gguf_header
from .gguf_header import REPAIR
from .stored import StoredLayer

TITLE = "GGUF"
ENDING = ".gguf"
DENSE = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 24: torch.int8, 26: torch.int32}
ORIGINAL = "comfy.gguf.orig_shape."


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
    gguf_header.check(path, {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()})
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
    data = pages.empty((int(t.n_bytes),), torch.uint8)
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
