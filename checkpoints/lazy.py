"""Tensors of safetensors files that are read when they are taken, one at a time: unpacking a file then costs its own
size.

Not memory-mapped: a mapped page that was read once stays counted until the file is closed. Big tensors get memory of
their own, given back to the system the moment they go: the C library keeps freed blocks of up to 32 MiB and reuses them
only where they fit, and thousands of layers, unpacked and joined, leave a fifth of a file's size in such holes.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..writing import tensors as files
from . import folder, header
from .errors import CheckpointError

# Without F4, of which the file counts two numbers for each of torch's.
DTYPES = {name: dtype for dtype, name in files.DTYPES.items() if name != "F4"}
SMALL = 2**20  # below this the ordinary allocator
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
    """An uninitialised or zero CPU tensor; one without values where ``like`` has none."""
    if like is not None and like.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALL:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).reshape(shape)


class LazyTensors(MutableMapping):
    """Name -> tensor over several files. ``pop`` reads and forgets; what is assigned is kept."""

    def __init__(self, heads: list[tuple[Path, header.Header]], rename: bool = True):
        """``rename``: a file of one layer whose tensors are named by their part alone gets names as others have."""
        self._files: list[BinaryIO] = []
        self._places: dict[str, tuple] = {}
        self._held: dict[str, Tensor] = {}
        keys = [n for _, head in heads for n in head.tensors]
        named = header.names(keys) if rename else dict(zip(keys, keys, strict=True))
        try:
            for path, head in heads:
                self._open(path, head, named)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, head: header.Header, named: Mapping[str, str]) -> None:
        file = path.open("rb")
        self._files.append(file)
        start = 8 + int.from_bytes(file.read(8), "little")
        offsets = json.loads(file.read(start - 8))
        for key, entry in head.tensors.items():
            name = named[key]
            if name in self._places:
                raise CheckpointError(path.name, "two files of the folder hold this tensor", header.AGAIN, name)
            self._places[name] = (file, start + offsets[key]["data_offsets"][0], entry, path.name)

    def entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype by safetensors' name, shape), without reading."""
        if name in self._held:
            return describe(self._held[name])
        entry = self._places[name][2]
        return entry.dtype, entry.shape

    def __getitem__(self, name: str) -> Tensor:
        if name in self._held:
            return self._held[name]
        file, start, entry, source = self._places[name]
        dtype = self.dtype(name)
        data = empty((entry.nbytes,), torch.uint8)
        try:
            file.seek(start)
            read = file.readinto(memoryview(data.numpy()))
        except OSError as e:
            raise CheckpointError(source, f"it cannot be read ({e.strerror})", header.AGAIN, name) from e
        if read != entry.nbytes:
            raise CheckpointError(source, "not a whole safetensors file (it is truncated)", header.AGAIN, name)
        return data.view(dtype).reshape(entry.shape)

    def dtype(self, name: str) -> torch.dtype:
        """Raises CheckpointError for a type that this version does not know."""
        if name in self._held:
            return self._held[name].dtype
        _, _, entry, source = self._places[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                source, f"its type {entry.dtype} is unknown to this version", "Update this pack", name
            )
        return DTYPES[entry.dtype]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._held[name] = value

    def __delitem__(self, name: str) -> None:
        if self._held.pop(name, None) is None and name not in self._places:
            raise KeyError(name)
        self._places.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._held or name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter({**self._places, **self._held})

    def __len__(self) -> int:
        return len(self._places.keys() | self._held.keys())

    def close(self) -> None:
        for file in self._files:
            file.close()


@contextmanager
def opened(path: Path) -> Iterator[tuple[str, LazyTensors, Mapping[str, str]]]:
    """(what errors call it, tensors, metadata) of the model at ``path``, of whatever files. Raises CheckpointError."""
    files = folder.files(path)
    heads = [header.read(f) for f in files]
    name = path.name if len(files) > 1 else files[0].name
    with closing(LazyTensors(list(zip(files, heads, strict=True)))) as tensors:
        yield name, tensors, header.merged(name, heads).metadata


class Asked(Mapping):
    """Name -> tensor that is made each time it is asked for, and kept nowhere."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]):
        self._names, self._make = list(names), make

    def __getitem__(self, name: str) -> Tensor:
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def describe(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)


def entries(tensors) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of loaded or lazy tensors."""
    if isinstance(tensors, LazyTensors):
        return {name: tensors.entry(name) for name in tensors}
    return {name: describe(t) for name, t in tensors.items()}
