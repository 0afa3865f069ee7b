"""What a safetensors file says it holds, without reading its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError

MAX_TENSORS = 200_000
MAX_METADATA = 4 * 2**20
AGAIN = "Download or write the file again"
BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
         "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    dtype: str  # safetensors' own names: F16, I8 ...
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        n = BYTES.get(self.dtype, 1)
        for s in self.shape:
            n *= s
        return n


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
    try:
        with safe_open(path, framework="pt") as f:
            names = list(f.keys())
            if len(names) > MAX_TENSORS:
                raise CheckpointError(path.name, f"its header lists {len(names)} tensors", "It is not a model file")
            slices = ((n, f.get_slice(n)) for n in names)
            tensors = {n: Entry(str(s.get_dtype()), tuple(s.get_shape())) for n, s in slices}
            metadata = f.metadata() or {}
    except (SafetensorError, OSError, UnicodeDecodeError) as e:
        raise CheckpointError(path.name, f"not a whole safetensors file ({_reason(e)})", AGAIN) from e
    if sum(len(k) + len(v) for k, v in metadata.items()) > MAX_METADATA:
        raise CheckpointError(path.name, "its metadata is larger than 4 MiB", AGAIN)
    return Header(path.name, tensors, metadata)


def _reason(e: Exception) -> str:
    """The library's own words without its wrapper: 'MetadataIncompleteBuffer' says 'truncated' to nobody."""
    text = str(e)
    if "IncompleteBuffer" in text or "incomplete" in text.lower():
        return "it is truncated"
    if "HeaderTooLarge" in text or "HeaderTooSmall" in text or "InvalidHeader" in text or "header" in text.lower():
        return "its header is not valid"
    return text.strip().splitlines()[0][:120]
