"""Writing checkpoints: atomically, never over a file that is there, with a record of where they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from torch import Tensor

from ..writing import tensors as tensor_files
from ..writing.whole import named
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
    """Writes a safetensors file, whole or not at all. Raises CheckpointError when ``path`` exists, WriteError when it
    cannot be written.
    """
    path = Path(path)
    with named(path.name):
        taken = path.exists() and not overwrite
    if taken:
        raise CheckpointError(path.name, "there is a file of this name already", "Choose another name")
    return tensor_files.save(path, tensors, {"format": "pt", **info}, overwrite)


def record(**values) -> dict[str, str]:
    """The metadata entry that says how a file came to be; ``values`` are JSON-able. Holds no local paths."""
    return {RECORD: json.dumps({"tool": f"ComfyUI-Nibble {version()}", **values}, sort_keys=True)}
