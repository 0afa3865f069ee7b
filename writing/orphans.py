"""Temporary files, and what is left of them when a process is killed.

    .<name>.<process>-<number>.part      in the folder of <name>

While one is written its process holds a lock on it (Windows: has it open, which hinders its removal there), and the
system gives the lock back when the process ends, however it ends. So a file is an orphan when its lock can be had, and
its process is gone or is this one, which knows what it writes. Where another process has that number by now, or where
the file system knows no locks, nobody may have touched the file for an hour besides.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import time
from pathlib import Path
from typing import BinaryIO

from ..reading.names import shown

if os.name != "nt":
    import fcntl

log = logging.getLogger(__name__)
PART = re.compile(r"\..+\.(\d{1,10})(?:-\d+)?\.part", re.DOTALL)
LONGEST, LONG_AGO = 255, 3600.0  # bytes of a name, seconds
_number = itertools.count()
_mine: set[Path] = set()  # what this process writes


def begin(path: Path) -> tuple[Path, BinaryIO]:
    """(a new temporary file beside ``path``, the same opened and locked)."""
    while True:
        part = path.with_name(_name(path.name))
        try:
            file = part.open("xb")
        except FileExistsError:
            continue
        _mine.add(part)
        if _lock(file) is not False and (os.name == "nt" or os.fstat(file.fileno()).st_nlink):
            return part, file
        file.close()  # another process took it for an orphan before it was locked
        end(part)


def _name(name: str) -> str:
    ending = f".{os.getpid()}-{next(_number)}.part"
    while len(os.fsencode(name)) + len(ending) + 1 > LONGEST:
        name = name[:-1]
    return f".{name}{ending}"


def end(part: Path) -> None:
    """Removes a temporary file that has not been moved into place."""
    with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)
    _mine.discard(part)


def _lock(file) -> bool | None:
    """Whether the lock on ``file`` is ours now; None where there are none. Not waited for."""
    if os.name == "nt":
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sweep(folder: Path) -> list[str]:
    """Removes the orphans directly in ``folder``; their names. What cannot be removed or looked at is left."""
    removed, freed = [], 0
    try:
        with os.scandir(folder) as entries:
            found = [Path(e.path) for e in entries if e.name.endswith(".part") and PART.fullmatch(e.name)]
    except OSError:
        return removed
    for part in found:
        with contextlib.suppress(OSError):
            size = part.stat().st_size
            if _remove(part):
                removed.append(part.name)
                freed += size
    if removed:
        names = ", ".join(map(shown, removed[:3])) + (", ..." if len(removed) > 3 else "")
        what = f"{len(removed)} files ({freed / 1e6:.1f} MB)"
        log.info("Nibble removed %s that killed processes had left half written: %s", what, names)
    return removed


def _remove(part: Path) -> bool:
    """Whether ``part`` was an orphan, and is gone."""
    if part in _mine or part.is_symlink() or not part.is_file():
        return False
    process = int(PART.fullmatch(part.name)[1])
    gone = process == os.getpid() or not alive(process)
    old = time.time() - part.stat().st_mtime > LONG_AGO
    if os.name == "nt":
        if gone or old:
            part.unlink()  # refused while it is open
        return gone or old
    with part.open("rb") as file:
        lock = _lock(file)
        orphan = lock is not False and ((gone and old) if lock is None else (gone or old))
        if orphan:
            part.unlink()
    return orphan


def sweep_below(root: Path, depth: int = 4, most: int = 10_000) -> list[str]:
    """`sweep` of ``root`` and of the folders in it, ``most`` of them at most."""
    removed = []
    for _, (folder, below, _files) in zip(range(most), os.walk(root), strict=False):
        removed += sweep(Path(folder))
        if len(Path(folder).relative_to(root).parts) >= depth:
            below.clear()
    return removed


def alive(process: int) -> bool:
    """Whether there is a process of this number."""
    if os.name == "nt":
        return _alive_on_windows(process)
    try:
        os.kill(process, 0)  # asks, and sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # another user's
    return process > 0


def _alive_on_windows(process: int) -> bool:
    """There, os.kill would end it."""
    import ctypes
    from ctypes import wintypes

    limited_information, access_denied, still_active = 0x1000, 5, 259
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel.OpenProcess.restype = wintypes.HANDLE
    kernel.OpenProcess.argtypes = wintypes.DWORD, wintypes.BOOL, wintypes.DWORD
    kernel.GetExitCodeProcess.argtypes = wintypes.HANDLE, ctypes.POINTER(wintypes.DWORD)
    kernel.CloseHandle.argtypes = (wintypes.HANDLE,)
    handle = kernel.OpenProcess(limited_information, False, process)
    if not handle:
        return ctypes.get_last_error() == access_denied
    try:
        code = wintypes.DWORD()
        return not kernel.GetExitCodeProcess(handle, ctypes.byref(code)) or code.value == still_active
    finally:
        kernel.CloseHandle(handle)
