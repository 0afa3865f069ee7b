"""Runs that were stopped or killed, kept so that the same run goes on, and no more of them than a disk can bear.

    <root>/<signature>/            what the run keeps; the signature changes with anything its result depends on
                       run.json    {"what": "Train LoRA: 48 pictures", "began": "2026-11-21 14:03"}
                       lock        locked while a process works on the run

When another run begins, the newest `MOST_RUNS` of at most `MOST_BYTES` together stay; older ones are removed and named.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..reading.names import shown
from . import orphans, whole
from .room import amount, check_room
from .whole import WriteError

if os.name != "nt":
    import fcntl

FOLDER = "nibble_unfinished"
MOST_RUNS, MOST_BYTES = 8, 2**34
IDLE = 86400.0  # seconds
RECORD, LOCK = "run.json", "lock"
ENDED = "What was trained is kept, and the same run only writes it."


@dataclass
class Kept:
    """``folder``: where the run keeps what it has done, None where nothing can be kept. ``notes``: sentences for its
    report.
    """

    folder: Path | None
    notes: list[str] = field(default_factory=list)
    _lock: object = None

    def off(self, why: Exception | str) -> None:
        """Nothing is kept from now on."""
        self.folder = None
        self.notes.append(f"If this run is stopped it begins anew: {why}")

    def finish(self) -> None:
        """Forgets the run: its result is safe elsewhere."""
        self._release()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # others are kept there
                self.folder.parent.rmdir()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


@contextmanager
def run(root: Path, signature: str, what: str, need: int = 0) -> Iterator[Kept]:
    """What the run of ``signature`` keeps in ``root``. ``what`` names it for people; ``need``: bytes that it keeps at
    most. Without room or permission it goes on and keeps nothing, and says so in its notes.
    """
    kept = Kept(root / signature)
    try:
        _begin(kept, root, what, need)
    except (WriteError, OSError) as e:
        kept._release()
        kept.off(e if isinstance(e, WriteError) else WriteError.of(e, root.name))
    try:
        yield kept
    finally:
        kept._release()


def _begin(kept: Kept, root: Path, what: str, need: int) -> None:
    folder = kept.folder
    for name in trim(root, folder, need):
        kept.notes.append(f"Removed the unfinished run {name}: {MOST_RUNS} of {amount(MOST_BYTES)} are the most")
    check_room(folder / RECORD, max(0, need - _bytes_of(folder)), "")
    orphans.sweep(folder)
    record = {"what": what, "began": time.strftime("%Y-%m-%d %H:%M")}
    if not (folder / RECORD).is_file():
        whole.text(folder / RECORD, json.dumps(record))
    os.utime(folder / RECORD)  # the newest
    kept._lock = _locked(folder / LOCK, shared=True)
    others = "; ".join(str(r) for r in runs(root) if r.folder != folder)
    if others:
        kept.notes.append(f"Other unfinished runs in {shown(root.name)}: {others}. Delete what is not wanted")


def _locked(path: Path, shared: bool):
    """An open file with a lock, which processes at work on one run share; None where another's lock is in the way, or
    where there are no locks and the run may be worked on.
    """
    file = path.open("ab")
    if os.name != "nt":
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as e:
            if isinstance(e, BlockingIOError) or not (shared or _idle(path.parent)):
                file.close()
                return None
    return file


def _idle(folder: Path) -> bool:
    """Whether nothing in ``folder`` was written lately."""
    return time.time() - max(p.stat().st_mtime for p in folder.rglob("*")) > IDLE


@dataclass(frozen=True)
class Run:
    """One of the unfinished runs of a folder."""

    folder: Path
    what: str
    changed: float
    size: int

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.changed))
        return f"{self.what}, {when}, {amount(self.size)}"


def runs(root: Path) -> list[Run]:
    """The unfinished runs in ``root``, the newest first."""
    try:
        folders = [p for p in root.iterdir() if p.is_dir() and not p.is_symlink()]
    except OSError:
        return []
    found = []
    for folder in folders:
        with contextlib.suppress(OSError):  # finished meanwhile
            found.append(Run(folder, _what(folder), _changed(folder), _bytes_of(folder)))
    return sorted(found, key=lambda r: (-r.changed, r.folder.name))


def _what(folder: Path) -> str:
    try:
        said = json.loads((folder / RECORD).read_text(encoding="utf-8"))["what"]
    except (OSError, ValueError, KeyError, TypeError):
        said = folder.name
    return shown(said)


def _changed(folder: Path) -> float:
    record = folder / RECORD
    return (record if record.is_file() else folder).stat().st_mtime


def _bytes_of(folder: Path) -> int:
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(at, name)).st_size
    return total


def trim(root: Path, keep: Path | None = None, need: int = 0) -> list[str]:
    """Removes the oldest runs beyond `MOST_RUNS` and `MOST_BYTES`, never ``keep``, which takes ``need`` bytes, or one
    that is being worked on; what was removed.
    """
    removed, count, total = [], int(keep is not None), need
    for one in runs(root):
        if one.folder == keep:
            continue
        count, total = count + 1, total + one.size
        if (count > MOST_RUNS or total > MOST_BYTES) and _remove(one.folder):
            count, total = count - 1, total - one.size
            removed.append(str(one))
    return removed


def _remove(folder: Path) -> bool:
    """Whether nobody works on the run in ``folder``, and it is gone."""
    try:
        lock = _locked(folder / LOCK, shared=False)
        if lock is None:
            return False
        with lock:
            if os.name != "nt":
                shutil.rmtree(folder)
        if os.name == "nt":
            (folder / LOCK).unlink()  # refused while another process has it open
            shutil.rmtree(folder)
    except OSError:
        return False
    return True
