"""How large a file will be, for who asks whether there is room for it before the work."""

from __future__ import annotations

from pathlib import Path

from . import folder


def repacked(path: Path, requantize: bool) -> int:
    """Bytes that rewriting the model at ``path`` takes at least: its codes stay, or become int4."""
    size = sum(f.stat().st_size for f in folder.files(path))
    return size // 2 if requantize else size * 9 // 10
