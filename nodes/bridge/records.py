"""Saved runs under output/: new names, written whole or not at all, and listed for the nodes that read them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import folder_paths

from ...profiling import calibrate, tables
from ...profiling.calibrate import Constants
from ...profiling.report import FORMAT, MAX_BYTES, Run, from_json
from ...profiling.timeline import timeline
from ...reading.names import UNENCODABLE, encodable, shown
from ...writing import whole
from .. import files

FOLDER = "nibble"
ENDINGS = (".json", ".md", ".csv", ".png")
CALIBRATION = ".calibration.json"
NONE = "none"
NEWEST, BEFORE = "the newest run", "the run before it"
MOST = 500  # saved runs that are looked at, the newest; older ones stay in the folder


@dataclass(frozen=True)
class Files:
    """``stem``: full path of a run's files without their ending."""

    stem: str

    def path(self, ending: str) -> Path:
        return Path(self.stem + ending)

    def write(self, run: Run) -> None:
        """JSON, markdown, CSV and the picture. Replaces only files of this same stem."""
        write_whole(self.path(".json"), run.to_json().encode())
        write_whole(self.path(".md"), encodable(tables.markdown(run)).encode())
        write_whole(self.path(".csv"), encodable(tables.to_csv(run)).encode())
        write_picture(self.path(".png"), timeline(run))

    def shown(self, ending: str) -> dict[str, str]:
        """A file as ComfyUI's front end asks for it."""
        return as_output(self.path(ending))


def as_output(path: Path) -> dict[str, str]:
    """An output file as ComfyUI's front end asks for it."""
    below = path.relative_to(folder_paths.get_output_directory())
    return {
        "filename": below.name,
        "subfolder": below.parent.as_posix() if below.parent.parts else "",
        "type": "output",
    }


def new_files(prefix: str) -> Files:
    """Names under output/ that no file has; ``prefix`` may hold a subfolder and %date% parts. Raises ValueError for one
    that leads out of it.
    """
    folder, name, counter = files.numbered(prefix)
    while any(os.path.exists(os.path.join(folder, f"{name}_{counter:05}_{ending}")) for ending in ENDINGS):
        counter += 1
    return Files(os.path.join(folder, f"{name}_{counter:05}_"))


def write_whole(path: Path, data: bytes) -> None:
    """Writes through a temporary file in the same folder, so that nobody ever reads half of it."""
    whole.data(path, data)


def write_picture(path: Path, image) -> None:
    whole.picture(path, image)


def saved() -> list[str]:
    """Names of the saved runs in output/nibble, newest first."""
    return [e.name for e in _newest() if _is_run(e.path)]


def _folder() -> Path:
    return Path(folder_paths.get_output_directory()) / FOLDER


def _newest() -> list[os.DirEntry]:
    """The newest files that may be saved runs, whatever is in them."""
    found = [e for e in files.entries(_folder(), ".json") if not e.name.endswith(CALIBRATION)]
    return sorted(found, key=lambda e: (-_changed(e), e.name))[:MOST]


def _changed(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_mtime_ns
    except OSError:  # deleted meanwhile
        return 0


def _is_run(path: str) -> bool:
    try:
        with open(path, "rb") as f:
            return FORMAT.encode() in f.read(200)
    except (OSError, ValueError):  # the latter for a name that no file can have
        return False


def is_saved(name: str) -> bool:
    """Whether ``name`` is that of a saved run, old ones included."""
    plain = name.endswith(".json") and not name.endswith(CALIBRATION) and not UNENCODABLE.search(name)
    return plain and os.path.basename(name) == name and _is_run(os.fspath(_folder() / name))


def choices() -> list[str]:
    """The last two runs by what they are, so that a workflow can name them before they exist; then all by name."""
    return [BEFORE, NEWEST, *saved()]


def name_of(choice: str) -> str:
    """The file of a choice. Raises ValueError when there are not enough runs yet."""
    if choice not in (NEWEST, BEFORE):
        return choice
    names, index = saved(), int(choice == BEFORE)
    if index >= len(names):
        raise ValueError(f"there is no saved run to be '{choice}' yet. Run a workflow with Profile this Run first")
    return names[index]


def load(name: str) -> Run:
    """The saved run ``name``, its labels as they can be shown. Raises ValueError for a name that is none or a file that
    is no run.
    """
    if not is_saved(name):
        raise ValueError(f"{shown(name)}: there is no such saved run. Choose one from the list")
    path = _folder() / name
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{shown(name)}: it is larger than a profile can be. Choose a run that Profile this Run saved")
    run = from_json(path.read_text(encoding="utf-8"), shown(name))
    samplings = tuple(replace(s, label=shown(s.label)) for s in run.samplings)
    return replace(run, label=shown(run.label), samplings=samplings)


def fingerprint(choices: list[str]) -> str:
    """Changes when one of the chosen runs does, or when another becomes the newest."""
    names = [*choices, *saved()[:2]] if {NEWEST, BEFORE} & set(choices) else choices
    return _stamps(_folder() / os.path.basename(n) for n in names if n not in (NONE, NEWEST, BEFORE))


def measured() -> str:
    """Changes when anything does that estimates are calibrated with: a saved run, or a file of `nibble profile`."""
    return "|".join(f"{e.name}-{_changed(e)}" for e in _newest()) + _stamps(_calibrations())


def _stamps(paths: Iterable[Path]) -> str:
    return "|".join(f"{p.name}-{p.stat().st_mtime_ns}" if p.is_file() else f"{p.name}-missing" for p in paths)


def _calibrations() -> list[Path]:
    return sorted(Path(e.path) for e in files.entries(_folder(), CALIBRATION))


def calibrations() -> list[Constants]:
    """Rows that `nibble profile` wrote into output/nibble. Raises ValueError for a file that is not one."""
    rows: list[Constants] = []
    for path in _calibrations():
        if path.stat().st_size > calibrate.MAX_BYTES:
            raise ValueError(f"{shown(path.name)}: it is larger than a calibration can be. Delete it or measure again")
        rows += calibrate.from_json(path.read_text(encoding="utf-8"), shown(path.name))
    return rows
