"""Which files of the tree are the project's: a clone also holds virtual environments, builds and what programs left."""

from __future__ import annotations

import os
import subprocess
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {"build", "dist", "out", "site-packages", "node_modules", "__pycache__"}


@lru_cache(maxsize=8)
def project_files(root: Path = ROOT) -> tuple[Path, ...]:
    """Every file of the project in ``root``, relative to it, in order: what git tracks or would track, or, where
    ``root`` is no git repository of its own, what lies there. Never what is in a virtual environment, whatever its
    name.
    """
    listed = _of_git(root)
    if listed is None:
        return tuple(sorted(_walked(root)))
    foreign: dict[Path, bool] = {}
    return tuple(sorted(p for p in listed if (root / p).is_file() and not _in_foreign(root, p.parent, foreign)))


def _of_git(root: Path) -> list[Path] | None:
    """None without git, and where the repository begins elsewhere: one around this folder ignores it, or knows it by
    other names.
    """
    try:
        top = _git(root, "rev-parse", "--show-toplevel").decode().rstrip("\n")
        if not os.path.samefile(top, root):
            return None
        tracked = _git(root, "ls-files", "-z")
        new = _git(root, "ls-files", "-z", "--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):
        return None
    paths = [[Path(os.fsdecode(name)) for name in out.split(b"\0") if name] for out in (tracked, new)]
    return paths[0] + [p for p in paths[1] if not any(part.startswith(".") for part in p.parts[:-1])]


def _git(root: Path, *args: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), *args], check=True, capture_output=True).stdout


def _in_foreign(root: Path, folder: Path, known: dict[Path, bool]) -> bool:
    if folder == Path():
        return False
    if folder not in known:
        inside = _in_foreign(root, folder.parent, known)
        known[folder] = inside or folder.name in NOT_OURS or _is_environment(root / folder)
    return known[folder]


def _walked(root: Path):
    for folder, below, names in os.walk(root):
        here = Path(folder)
        below[:] = [d for d in below if not d.startswith(".") and d not in NOT_OURS and not d.endswith(".egg-info")
                    and not _is_environment(here / d)]  # fmt: skip
        yield from (here.relative_to(root) / n for n in names if (here / n).is_file())


def _is_environment(folder: Path) -> bool:
    """A virtual environment (venv, virtualenv, uv), one of conda's, or another repository put inside."""
    return any((folder / mark).exists() for mark in ("pyvenv.cfg", "conda-meta", ".git"))
