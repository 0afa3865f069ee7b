"""Writing checkpoints: atomically, never over a file that is there, with a record of where they came from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError

RECORD = "nibble"  # the metadata key of our record, a JSON object
DISTRIBUTION = "nibble-4bit"


def version() -> str:
    """This pack's version: the installed distribution's, or pyproject.toml's beside the sources."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
        return next(line.split('"')[1] for line in text.splitlines() if line.startswith("version"))


def sha256(paths: Iterable[Path]) -> str:
    """Hex digest over the contents of ``paths`` in order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while block := f.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def save(path: str | Path, tensors: Mapping[str, Tensor], info: Mapping[str, str], overwrite: bool = False) -> Path:
    """Writes a safetensors file through a temporary one in the same folder. Raises CheckpointError when ``path``
    exists.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise CheckpointError(path.name, "there is a file of this name already", "Choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(_separate(tensors), part, {"format": "pt", **info})
        _sort_metadata(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, as the format demands (split q/k/v share their sides)."""
    out, seen = {}, set()
    for name, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return out


def _sort_metadata(path: Path) -> None:
    """Puts the header's metadata in order, in place: the library writes it in a random one, and same input must mean
    same bytes.
    """
    with path.open("r+b") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            f.seek(8)
            f.write(text.ljust(size))


def record(**values) -> dict[str, str]:
    """The metadata entry that says how a file came to be; ``values`` are JSON-able. Holds no local paths."""
    return {RECORD: json.dumps({"tool": f"ComfyUI-Nibble {version()}", **values}, sort_keys=True)}
