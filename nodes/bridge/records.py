"""Saved runs under output/: new names, written whole or not at all, and listed for the nodes that read them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ...profiling import calibrate, tables
from ...profiling.calibrate import Constants
from ...profiling.report import FORMAT, MAX_BYTES, Run, from_json
from ...profiling.timeline import timeline
from ...writing import whole

FOLDER = "nibble"
ENDINGS = (".json", ".md", ".csv", ".png")
CALIBRATION = ".calibration.json"
NONE = "none"
NEWEST, BEFORE = "the newest run", "the run before it"


@dataclass(frozen=True)
class Files:
    """``stem``: full path of a run's files without their ending."""

    stem: str

    def path(self, ending: str) -> Path:
        return Path(self.stem + ending)

    def write(self, run: Run) -> None:
        """JSON, markdown, CSV and the picture. Replaces only files of this same stem."""
        write_whole(self.path(".json"), run.to_json().encode())
        write_whole(self.path(".md"), tables.markdown(run).encode())
        write_whole(self.path(".csv"), tables.to_csv(run).encode())
        write_picture(self.path(".png"), timeline(run))

    def shown(self, ending: str) -> dict[str, str]:
        """A file as ComfyUI's front end asks for it."""
        return shown(self.path(ending))


def shown(path: Path) -> dict[str, str]:
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
    output = folder_paths.get_output_directory()
    if not folder_paths.is_within_directory(output, os.path.join(output, prefix)):
        raise ValueError(f"{prefix!r} leads out of the output folder. Give a name like {FOLDER}/run")
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, output)
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
    folder = Path(folder_paths.get_output_directory()) / FOLDER
    if not folder.is_dir():
        return []
    files = [p for p in folder.glob("*.json") if p.is_file() and not p.name.endswith(CALIBRATION) and _is_run(p)]
    return [p.name for p in sorted(files, key=lambda p: (-p.stat().st_mtime_ns, p.name))]


def _is_run(path: Path) -> bool:
    with path.open("rb") as f:
        return FORMAT.encode() in f.read(200)


def choices() -> list[str]:
    """The last two runs by what they are, so that a workflow can name them before they exist; then all by name."""
    return [BEFORE, NEWEST, *saved()]


def name_of(choice: str) -> str:
    """The file of a choice. Raises ValueError when there are not enough runs yet."""
    if choice not in (NEWEST, BEFORE):
        return choice
    names, index = saved(), int(choice == BEFORE)
    if index >= len(names):
        raise ValueError(f"there is no saved run to be {choice!r} yet. Run a workflow with Profile this Run first")
    return names[index]


def load(name: str) -> Run:
    """The saved run ``name``. Raises ValueError for a name that is not in the list or a file that is no run."""
    if name not in saved():
        raise ValueError(f"{os.path.basename(name)}: there is no such saved run. Choose one from the list")
    path = Path(folder_paths.get_output_directory()) / FOLDER / name
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{name}: it is larger than a profile can be. Choose a run that Profile this Run saved")
    return from_json(path.read_text(encoding="utf-8"), name)


def fingerprint(choices: list[str]) -> str:
    """Changes when one of the chosen runs does, or when another becomes the newest."""
    folder = Path(folder_paths.get_output_directory()) / FOLDER
    names = [*choices, *saved()[:2]] if {NEWEST, BEFORE} & set(choices) else choices
    files = [folder / os.path.basename(n) for n in names if n not in (NONE, NEWEST, BEFORE)]
    return _stamps(files)


def measured() -> str:
    """Changes when anything does that estimates are calibrated with: a saved run, or a file of `nibble profile`."""
    folder = Path(folder_paths.get_output_directory()) / FOLDER
    return _stamps([*(folder / name for name in saved()), *_calibrations()])


def _stamps(files: list[Path]) -> str:
    return "|".join(f"{p.name}-{p.stat().st_mtime_ns}" if p.is_file() else f"{p.name}-missing" for p in files)


def _calibrations() -> list[Path]:
    folder = Path(folder_paths.get_output_directory()) / FOLDER
    return sorted(folder.glob(f"*{CALIBRATION}")) if folder.is_dir() else []


def calibrations() -> list[Constants]:
    """Rows that `nibble profile` wrote into output/nibble. Raises ValueError for a file that is not one."""
    rows: list[Constants] = []
    for path in _calibrations():
        if path.stat().st_size > calibrate.MAX_BYTES:
            raise ValueError(f"{path.name}: it is larger than a calibration can be. Delete it or measure again")
        rows += calibrate.from_json(path.read_text(encoding="utf-8"), path.name)
    return rows
