"""Writing checkpoints: atomically, never over a file that is there, with a record of where they came from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from ..writing import tensors as tensor_files
from ..writing.whole import named
from . import header
from .errors import CheckpointError

log = logging.getLogger(__name__)
RECORD = "nibble"  # the metadata key of our record, a JSON object
RECORD_ROOM = 2**16  # what a record takes at most
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


def require_free(path: str | Path) -> None:
    """Raises CheckpointError when ``path`` exists: asked before the work as well as when it is written; WriteError
    where the system cannot say whether it does.
    """
    path = Path(path)
    with named(path.name):
        taken = path.exists()
    if taken:
        raise CheckpointError(path.name, "there is a file of this name already", "Choose another name")


def require_readable(name: str, tensors: int, info: Mapping[str, str], room: int = 0) -> None:
    """Raises CheckpointError for what `header.read` would refuse to read: too much metadata (``room``: bytes of it that
    are still to come), or too many tensors.
    """
    size = header.metadata_size(info) + room
    if size > header.MAX_METADATA:
        key = max(info, key=lambda k: len(info[k]), default="")
        what = f"its metadata would take {size / 2**20:.1f} MiB, most of it {key[:80]!r}, and 4 MiB are the most"
        raise CheckpointError(name, what, "Take that entry out")
    if tensors > header.MAX_TENSORS:
        what = f"it would hold {tensors} tensors, and {header.MAX_TENSORS} are the most"
        raise CheckpointError(name, what, "It is no model that can be read again")


def fitting(name: str, info: Mapping[str, str], optional: Iterable[str]) -> dict[str, str]:
    """``info`` without as many of its ``optional`` entries, the largest first, as it takes to be readable; the log says
    which.
    """
    info = dict(info)
    for key in sorted(set(optional) & info.keys(), key=lambda k: -len(info[k])):
        if header.metadata_size({"format": "pt", **info}) <= header.MAX_METADATA:
            break
        size = len(info.pop(key)) / 2**20
        log.warning("%s: its metadata entry %s (%.1f MiB) is left out: 4 MiB are the most", name, key, size)
    return info


@contextmanager
def writing(
    path: str | Path,
    entries: Mapping[str, tensor_files.Entry],
    info: Mapping[str, str],
    overwrite: bool = False,
    optional: Iterable[str] = (),
) -> Iterator[tensor_files.Writer]:
    """Hands out what takes the tensors of a safetensors file one at a time: see `writing.tensors.writing`.

    ``optional``: keys of ``info`` that may be left out where it would be too large to be read. Raises CheckpointError
    when ``path`` exists, and for what could not be read again; WriteError when it cannot be written.
    """
    path = Path(path)
    if not overwrite:
        require_free(path)
    info = {"format": "pt", **fitting(path.name, info, optional)}
    require_readable(path.name, len(entries), info)
    with tensor_files.writing(path, entries, info, overwrite) as writer:
        yield writer


def save(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    info: Mapping[str, str],
    overwrite: bool = False,
    optional: Iterable[str] = (),
) -> Path:
    """Writes a safetensors file, whole or not at all. Arguments and errors are those of `writing`."""
    with writing(path, tensor_files.entries(tensors), info, overwrite, optional) as writer:
        writer.write_all(tensors)
    return Path(path)


def record(**values) -> dict[str, str]:
    """The metadata entry that says how a file came to be; ``values`` are JSON-able. Holds no local paths."""
    return {RECORD: json.dumps({"tool": f"ComfyUI-Nibble {version()}", **values}, sort_keys=True)}


def kept_info(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a file that is made of one with ``metadata`` says on."""
    return {k: v for k, v in metadata.items() if k == RECORD or k.startswith("modelspec.")}


def extended(about: Mapping[str, str], **values) -> dict[str, str]:
    """``about`` with ``values`` added to its record, as this version's."""
    old = json.loads(about.get(RECORD, "{}"))
    return {**about, **record(**{k: v for k, v in old.items() if k != "tool"} | values)}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short digest of names, shapes and contents. Contents by sums in float64 and a few values: fast, and any
    retrained or patched weight changes it.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach()
        flat = t.flatten()
        step = max(1, flat.numel() // 64)
        few = flat[::step][:64].to("cpu", torch.float64)
        values = [float(flat.sum(dtype=torch.float64)), float(flat.abs().sum(dtype=torch.float64)), *few.tolist()]
        digest.update(json.dumps([name, list(t.shape), str(t.dtype), values]).encode())
    return digest.hexdigest()[:32]


def digest(**values) -> str:
    """A digest of ``values``, which are JSON-able."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def signature(**values) -> str:
    """A digest of everything that a run depends on, this pack's version with it."""
    return digest(version=version(), **values)
