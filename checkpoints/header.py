"""What a safetensors file says it holds, without reading its tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError

MAX_TENSORS = 200_000
MAX_HEADER = 100_000_000  # the library's own limit, in bytes
MAX_METADATA = 4 * 2**20
ALONE = "layer"  # what the only layer of a file is called when its tensors are named by their part alone
AGAIN = "Download or write the file again"
BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
         "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}  # fmt: skip
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # of types whose elements share bytes


@dataclass(frozen=True)
class Entry:
    dtype: str  # safetensors' own names: F16, I8 ...
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        if self.dtype in BITS:
            return prod(self.shape) * BITS[self.dtype] // 8
        return prod(self.shape) * BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Header:
    """``name`` is what errors call the file; never a full path, which would end up in shared logs."""

    name: str
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.tensors.values())


def read(path: str | Path) -> Header:
    """The header of ``path``. Raises CheckpointError for anything that is not a whole, sane safetensors file."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(path.name, "there is no such file", "Choose one from the list, or check the folder")
    with path.open("rb") as f:
        start = f.read(9)
    if start[:4] == b"GGUF":
        rename = "" if path.suffix == ".gguf" else "Let its name end in .gguf, and "
        raise CheckpointError(path.name, "this is a GGUF file", rename + "load it with Load 4-bit Model")
    # A safetensors header's length can start with the same bytes; its JSON follows at byte 8.
    if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise CheckpointError(
            path.name, "this is a pickle (.ckpt, .pt), which can run code", "Convert it to safetensors first"
        )
    count = _count(path)
    if count > MAX_TENSORS:
        raise CheckpointError(path.name, f"its header lists {count} tensors", "It is not a model file")
    try:
        with safe_open(path, framework="pt") as f:
            names = list(f.keys())
            slices = ((n, f.get_slice(n)) for n in names)
            tensors = {n: Entry(str(s.get_dtype()), tuple(s.get_shape())) for n, s in slices}
            metadata = f.metadata() or {}
    except (SafetensorError, OSError, UnicodeDecodeError) as e:
        raise CheckpointError(path.name, f"not a whole safetensors file ({_reason(e, path)})", AGAIN) from e
    if metadata_size(metadata) > MAX_METADATA:
        raise CheckpointError(path.name, "its metadata is larger than 4 MiB", AGAIN)
    return Header(path.name, tensors, metadata)


def merged(name: str, headers: Iterable[Header]) -> Header:
    """The headers of a model's files as one."""
    headers = list(headers)
    tensors = {n: e for h in headers for n, e in h.tensors.items()}
    return Header(name, tensors, {k: v for h in headers for k, v in h.metadata.items()})


def _count(path: Path) -> int:
    """How many tensors the header lists, before the library makes objects of them: a million take more than a GB."""
    word, found = b'"data_offsets"', 0
    with path.open("rb") as f:
        left, end = min(int.from_bytes(f.read(8), "little"), MAX_HEADER), b""
        while left > 0 and (piece := f.read(min(left, 2**20))):
            left -= len(piece)
            found += (end + piece).count(word)
            end = piece[-len(word) + 1 :]
    return found


def names(tensors: Iterable[str]) -> dict[str, str]:
    """What each tensor of a file is called here: as it is, or below `ALONE` in a file of one layer without a name."""
    keys = list(tensors)
    alone = ("weight" in keys or "qweight" in keys) and all("." not in k or k.startswith("weight.") for k in keys)
    return {k: f"{ALONE}.{k}" if alone else k for k in keys}


def metadata_size(metadata: Mapping[str, str]) -> int:
    """What `MAX_METADATA` limits, here and where files are written."""
    return sum(len(k) + len(v) for k, v in metadata.items())


def _reason(e: Exception, path: Path) -> str:
    """The library's own words without its wrapper: 'MetadataIncompleteBuffer' says 'truncated' to nobody."""
    text = str(e)
    if "IncompleteBuffer" in text or "incomplete" in text.lower():
        return "it is longer than its header says" if _surplus(path) > 0 else "it is truncated"
    if "HeaderTooLarge" in text or "HeaderTooSmall" in text or "InvalidHeader" in text or "header" in text.lower():
        return "its header is not valid"
    return text.strip().splitlines()[0][:120]


def _surplus(path: Path) -> int:
    """Bytes of the file beyond the last tensor that its header lists; negative where some are missing."""
    try:
        with path.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            entries = json.loads(f.read(size))
        ends = [int(e["data_offsets"][1]) for name, e in entries.items() if name != "__metadata__"]
        return path.stat().st_size - (8 + size + max(ends, default=0))
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return -1
