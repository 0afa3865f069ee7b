"""Files that nodes list, and files that they take by name. Names in workflows come from strangers: they are resolved
through folder_paths on every use; safetensors, and GGUF where a node reads it.

Listing never raises: ComfyUI asks for lists outside of any `try`, in the thread that runs the queue. What is gone or
may not be read is not listed, and neither is a name that is not UTF-8: no workflow can hold it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import folder_paths

from ..reading.names import UNENCODABLE, shown

SAFETENSORS = (".safetensors", ".sft")
GGUF = ".gguf"
MAX_NAME = 200  # bytes; disks allow 255, and we add a number, an ending and, while writing, more


def listed(folder: str, endings: str | tuple[str, ...]) -> list[str]:
    """The files of a model folder with one of ``endings``, in any case, as ComfyUI lists them."""
    try:
        found = folder_paths.get_filename_list(folder)
    except OSError:  # ComfyUI remembers a folder that is gone
        found = _walked(folder)
    return [n for n in encodable(found) if n.lower().endswith(endings)]


def _walked(folder: str) -> list[str]:
    """What ComfyUI would list if it looked again."""
    found = set()
    for root in folder_paths.get_folder_paths(folder):
        for at, below, here in os.walk(root, followlinks=True):
            below[:] = [name for name in below if name != ".git"]
            found.update(os.path.relpath(os.path.join(at, name), root) for name in here)
    return sorted(found)


def encodable(found: Iterable[str]) -> list[str]:
    """Without the names that are not UTF-8."""
    return [n for n in found if not UNENCODABLE.search(n)]


def entries(folder: str | os.PathLike, endings: str | tuple[str, ...]) -> list[os.DirEntry]:
    """The files directly in a folder with one of ``endings``, in any case and in no order."""
    try:
        with os.scandir(folder) as found:
            return [e for e in found if e.name.lower().endswith(endings) and encodable([e.name]) and _is_file(e)]
    except OSError:
        return []


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def names(folder: str) -> list[str]:
    """The safetensors files of a model folder, as its loader lists them."""
    return listed(folder, SAFETENSORS)


def model_names(folder: str) -> list[str]:
    """`names` and the GGUF files of a model folder, which ComfyUI itself does not list."""
    return names(folder) + listed(_with_gguf(folder), GGUF)


def _with_gguf(folder: str) -> str:
    """A model folder of ComfyUI's that holds the GGUF files of ``folder``: same places, other ending."""
    name = f"nibble_gguf_{folder}"
    folder_paths.folder_names_and_paths[name] = (folder_paths.get_folder_paths(folder), {GGUF})
    return name


def path(folder: str, name: str) -> str:
    """The file ``name`` of a model folder. Raises ValueError for another ending, FileNotFoundError when it is not
    there.
    """
    gguf = name.lower().endswith(GGUF)
    if not gguf and not name.lower().endswith(SAFETENSORS):
        raise ValueError(
            f"{shown(os.path.basename(name))}: only safetensors files are loaded. Convert it to safetensors first"
        )
    full = folder_paths.get_full_path(_with_gguf(folder) if gguf else folder, name)
    if full is None:
        raise FileNotFoundError(f"{shown(name)}: there is no such file in models/{folder}. Choose one from the list")
    return full


def fingerprint(folder: str, name: str) -> str:
    """Changes when the file does, so that a node that read it runs again. ``name`` is empty where it is linked."""
    if not name:
        return ""
    full = folder_paths.get_full_path(_with_gguf(folder) if name.lower().endswith(GGUF) else folder, name)
    if full is None:
        return "missing"
    stat = os.stat(full)
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def new_output(prefix: str, ending: str = ".safetensors") -> str:
    """A path under output/ that no file has yet; ``prefix`` may hold a subfolder and %date% parts. Raises ValueError
    for one that leads out of it.
    """
    folder, name, counter = numbered(prefix)
    while os.path.exists(full := os.path.join(folder, f"{name}_{counter:05}_{ending}")):
        counter += 1
    return full


def numbered(prefix: str) -> tuple[str, str, int]:
    """(folder, name, a number that is free by ComfyUI's count) for ``prefix`` under output/."""
    output, instead = folder_paths.get_output_directory(), "Give a name like nibble/run"
    if UNENCODABLE.search(prefix) or "\0" in prefix:
        raise ValueError(f"'{shown(prefix)}' cannot be the name of a file. {instead}")
    if not folder_paths.is_within_directory(output, os.path.join(output, prefix)):
        raise ValueError(f"'{shown(prefix)}' leads out of the output folder. {instead}")
    if any(len(part.encode()) > MAX_NAME for part in Path(prefix).parts):
        raise ValueError(f"'{shown(prefix)}' is too long for the name of a file. {instead}")
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, output)
    return folder, name, counter


def below_output(full: str) -> str:
    """``full`` as seen from output/, with forward slashes: what may be shown and shared."""
    return os.path.relpath(full, folder_paths.get_output_directory()).replace(os.sep, "/")


def listed_path(choice: str, folders: tuple[str, ...]) -> str:
    """The file of a "folder/name" choice. Raises ValueError unless the folder is one of ``folders``."""
    folder, _, name = choice.partition("/")
    if folder not in folders or not name:
        raise ValueError(f"'{shown(choice)}' is not one of the listed files. Choose one from the list")
    return path(folder, name)


def input_names(endings: tuple[str, ...]) -> list[str]:
    """Files with one of ``endings`` directly in the input folder."""
    return sorted(e.name for e in entries(folder_paths.get_input_directory(), endings))


def input_fingerprint(name: str) -> str:
    """Changes when the file of the input folder does; "" for a name that is none."""
    full = os.path.join(folder_paths.get_input_directory(), name)
    if not name or not folder_paths.is_within_directory(folder_paths.get_input_directory(), full):
        return ""
    if not os.path.isfile(full):
        return ""
    stat = os.stat(full)
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def input_file(name: str) -> Path:
    """A file in the input folder. Raises ValueError for a name outside it."""
    folder = folder_paths.get_input_directory()
    full = os.path.join(folder, name)
    if not folder_paths.is_within_directory(folder, full) or not os.path.isfile(full):
        raise ValueError(f"{shown(name)}: there is no such file in the input folder")
    return Path(full)
