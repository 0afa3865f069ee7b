"""Whether a folder can take what long work will make, asked before the work is begun."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from . import orphans
from .whole import WriteError

SPARE = 2**20  # a header, a folder's entries


def amount(size: float) -> str:
    """Bytes for a person: 940 MB, 12.3 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}" if size < 100 * scale else f"{size / scale:.0f} {unit}"
    return f"{max(0, size) / 1e3:.0f} kB"


def free(folder: Path) -> int | None:
    """Bytes that are free for ``folder``, which need not be there yet; None where the system cannot say."""
    try:
        usage = shutil.disk_usage(nearest(folder))
    except OSError:
        return None
    return usage.free if usage.total else None  # some network folders say nothing


def nearest(folder: Path) -> Path:
    """``folder``, or the closest one above it that is there."""
    return next((p for p in (folder, *folder.parents) if p.is_dir()), folder)


def check_room(path: Path, need: int, kept: str = "Nothing was begun.") -> None:
    """Raises WriteError unless ``path`` can be made and ``need`` bytes are free for it. ``kept``: what the reader has
    of the work so far.
    """
    folder = nearest(path.parent)
    try:
        if any(p.exists() and not p.is_dir() for p in (path.parent, *path.parent.parents)):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        orphans.sweep(folder)
        part, file = orphans.begin(folder / path.name)
        file.close()
        orphans.end(part)
    except OSError as e:
        raise WriteError.of(e, path.name, kept) from e
    check_free(path, need, kept)


def check_free(path: Path, need: int, kept: str = "Nothing was begun.") -> None:
    """The second half of `check_room`."""
    have = free(path.parent)
    if have is not None and have < need + SPARE:
        why = f"it needs {amount(need)} and {amount(have)} are free"
        remedy = f"{kept} Free {amount(need + SPARE - have)}, or choose another folder".strip()
        raise WriteError(path.name, why, remedy)
