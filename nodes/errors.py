"""Exceptions as ComfyUI may log and show them: one line of a sane length, which any stream can write, without the
folders of this machine.

ComfyUI prints an exception with all that it was raised from, into a stream that is strict UTF-8. A lone surrogate, as
Python has for a byte of a file's name that is not UTF-8, raises there, and ends the thread that runs the queue.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from ..reading.names import sentence, shown

DEPTH = 10  # of what an exception was raised from; the rest is left out
END = r"(?![\w.~%-])"  # of a folder's name
MOST_READ = 20_000  # letters of a message that are looked at
# Folders of an absolute path: on POSIX, which must not be a link's or a relative path's, and on Windows.
FOLDERS = re.compile(r"(?<![\w.~/:%-])/(?:[^\s/'\"]+/)+|(?<!\w)[A-Za-z]:[\\/]+(?:[^\s\\/:'\"]+[\\/]+)+")


def told(text: object) -> str:
    """``text`` as one line without absolute paths: known folders by their names, others left out."""
    text = str(text)
    if len(text) > MOST_READ:
        text = f"{text[: MOST_READ // 2]} … {text[-MOST_READ // 2 :]}"
    for folder, name in _known():
        text = re.sub(re.escape(folder) + END, name, text)
    return sentence(FOLDERS.sub("…/", text))


def _known() -> list[tuple[str, str]]:
    """(path, how it is shown), longer ones first."""
    named = {
        folder_paths.get_output_directory(): "output", folder_paths.get_input_directory(): "input",
        folder_paths.get_temp_directory(): "temp", folder_paths.models_dir: "models",
        folder_paths.base_path: "ComfyUI", str(Path(__file__).parent.parent): "ComfyUI-Nibble", str(Path.home()): "~",
    }  # fmt: skip
    spelled = {
        way: name
        for path, name in named.items()
        for full in (path, os.path.realpath(path))
        for way in (full, full.replace("\\", "\\\\"))  # as repr() writes it
        if Path(full).parent != Path(full)
    }
    return sorted(spelled.items(), key=lambda row: -len(row[0]))


def message(e: BaseException) -> str:
    """What ``e`` says, as `told`; its type where it says nothing."""
    try:
        text = str(e)
    except Exception:  # noqa: BLE001 (a stranger's class)
        text = ""
    if isinstance(e, OSError):
        for name in (e.filename, e.filename2):
            if isinstance(name, str | bytes | os.PathLike) and name:
                base = shown(os.path.basename(os.fsdecode(name)))
                text = text.replace(repr(name), base).replace(str(name), base)
    return told(text) or type(e).__name__


def safe(e: BaseException, seen: tuple = ()) -> BaseException:
    """``e`` with its `message`, and so with all that it was raised from. Another exception of its type, or ValueError,
    where what it says cannot be changed.
    """
    out = _saying(e, message(e))
    cause = e.__cause__ if e.__cause__ is not None or e.__suppress_context__ else e.__context__
    if cause is not None:
        going_on = len(seen) < DEPTH and all(cause is not other for other in (*seen, e))
        cause = safe(cause, (*seen, e)) if going_on else None
    if out is not e or e.__cause__ is not None:
        out.__cause__ = cause  # hides the context, too
    else:
        out.__context__ = cause
    return out


def _saying(e: BaseException, text: str) -> BaseException:
    """``e`` itself where its message is ``text`` or can be made so: ComfyUI knows some exceptions by more than type."""
    if getattr(e, "__notes__", None):
        e.__notes__ = [told(note) for note in e.__notes__]
    parts = hasattr(e, "exceptions") or isinstance(e, SyntaxError)  # Python prints more of these than their message
    for make in (lambda: e, lambda: _changed(e, text), lambda: type(e)(text)):
        try:
            made = make()
            if str(made) == text and not (parts and made is e):
                return made.with_traceback(e.__traceback__)
        except Exception:  # noqa: BLE001, S112 (a stranger's class, which may want other arguments)
            continue
    return ValueError(text).with_traceback(e.__traceback__)


def _changed(e: BaseException, text: str) -> BaseException:
    e.args = (text,)
    return e
