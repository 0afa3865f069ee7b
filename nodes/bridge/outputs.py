"""What nodes write: names under output/, another folder where these cannot be written, and unfinished runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import folder_paths

from ...checkpoints import save as checkpoint
from ...checkpoints.errors import CheckpointError
from ...reading.names import shown
from ...training.job import Place
from ...writing import orphans, unfinished, whole
from .. import files

log = logging.getLogger(__name__)
INSTEAD = "nibble_rescued"  # below the temp folder
_elsewhere: set[Path] = set()  # what is there instead


def new(prefix: str, ending: str = ".safetensors") -> Path:
    """See `files.new_output`. Raises WriteError where the folder cannot be made."""
    with whole.named(prefix):
        return Path(files.new_output(prefix, ending))


def save(out: Path, write: Callable[[Path], object], kept: bool = False) -> str:
    """Has ``write`` make the file ``out``, or one in the temp folder where that cannot be: what took long is not lost.
    What to tell about it, "" for nothing. Raises WriteError where neither can be; ``kept``: it is soon made again.
    """
    _elsewhere.discard(out)
    try:
        write(out)
    except (whole.WriteError, CheckpointError) as e:  # the latter: the name was taken meanwhile
        instead = _instead(out)
        whole.remove(instead)
        try:
            write(instead)
        except whole.WriteError:
            raise e.saying(unfinished.ENDED) if kept and isinstance(e, whole.WriteError) else e from None
        _elsewhere.add(out)
        log.warning("%s. It is kept as %s", e, name_of(out))
        return f"{e}. It is kept as {shown(name_of(out))} until ComfyUI is started again: copy it from there"
    return ""


def name_of(out: Path) -> str:
    """The name of what `save` made of ``out``: below output/, or temp/ and the rest."""
    return f"temp/{INSTEAD}/{out.name}" if out in _elsewhere else files.below_output(str(out))


def _instead(out: Path) -> Path:
    return Path(folder_paths.get_temp_directory()) / INSTEAD / out.name


def unfinished_root() -> Path:
    return Path(folder_paths.get_output_directory()) / unfinished.FOLDER


def place(out: Path) -> Place:
    """Where a training job's file goes, see `save`. What an unfinished one keeps is under output/, since ComfyUI
    empties the temp folder when it starts.
    """

    def write(tensors, info, ended: bool) -> str:
        return save(out, lambda path: checkpoint.save(path, tensors, info), ended)

    return Place(unfinished_root(), out.stem, write)


def sweep() -> None:
    """Removes what killed processes left half written under output/, beside whatever ComfyUI does next."""
    root = Path(folder_paths.get_output_directory())
    threading.Thread(target=orphans.sweep_below, args=(root,), name="Nibble's sweep", daemon=True).start()


def with_notes(report: str, notes: list[str] | tuple[str, ...]) -> str:
    """A report in markdown, and what else is to be said, a paragraph each."""
    return "\n\n".join([report, *(n for n in dict.fromkeys(notes) if n)])
