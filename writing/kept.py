"""Safetensors files that only this pack reads back, so that work goes on: what they hold is proven by a checksum.

metadata "kept"      JSON of any values
         "checksum"  crc32 over these and names, dtypes, shapes and bytes of all tensors
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import tensors as files

KEY, CHECKSUM, DAMAGED = "kept", "checksum", ".damaged"


class Damaged(ValueError):
    """The file is not what was written."""


def save(path: Path, tensors: Mapping[str, Tensor], values: Mapping, durable: bool = True) -> None:
    """Writes ``tensors`` and the JSON-able ``values``. Raises WriteError."""
    text = json.dumps(values)
    files.save(path, tensors, {KEY: text, CHECKSUM: _checksum(text, tensors)}, durable=durable)


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, values) of a file that `save` wrote. Raises Damaged for any other, and for none."""
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            found = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        whole = metadata[CHECKSUM] == _checksum(metadata[KEY], found)
        values = json.loads(metadata[KEY])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        raise Damaged(path.name) from e
    if not whole or not isinstance(values, dict):
        raise Damaged(path.name)
    return found, values


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    out = zlib.crc32(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        out = zlib.crc32(f"{name} {t.dtype} {list(t.shape)}\n".encode(), out)
        for block in files.blocks(t):
            out = zlib.crc32(block, out)
    return f"{out:08x}"


def set_aside(path: Path) -> str:
    """Gives a damaged file another name, so that it is not read again; that name, or its own where it must stay."""
    aside = path.with_name(path.name + DAMAGED)
    with contextlib.suppress(OSError):
        os.replace(path, aside)
        return aside.name
    return path.name
