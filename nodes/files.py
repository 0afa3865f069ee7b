"""File names in workflows, which come from strangers: resolved through folder_paths on every use; safetensors, and GGUF
where a node reads it."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ..reading.names import shown

SAFETENSORS = (".safetensors", ".sft")
GGUF = ".gguf"


def names(folder: str) -> list[str]:
    """The safetensors files of a model folder, as its loader lists them."""
    return [n for n in folder_paths.get_filename_list(folder) if n.lower().endswith(SAFETENSORS)]


def model_names(folder: str) -> list[str]:
    """`names` and the GGUF files of a model folder, which ComfyUI itself does not list."""
    return names(folder) + [n for n in folder_paths.get_filename_list(_with_gguf(folder)) if n.lower().endswith(GGUF)]


def _with_gguf(folder: str) -> str:
    """A model folder of ComfyUI's that holds the GGUF files of ``folder``: same places, other ending."""
    name = f"nibble_gguf_{folder}"
    folder_paths.folder_names_and_paths[name] = (folder_paths.get_folder_paths(folder), {GGUF})
    return name


def path(folder: str, name: str) -> str:
    """The file ``name`` of a model folder. Raises ValueError for another ending, FileNotFoundError when it is not
    there.
    """
    if name.lower().endswith(GGUF):
        return folder_paths.get_full_path_or_raise(_with_gguf(folder), name)
    if not name.lower().endswith(SAFETENSORS):
        raise ValueError(
            f"{os.path.basename(name)}: only safetensors files are loaded. Convert it to safetensors first"
        )
    return folder_paths.get_full_path_or_raise(folder, name)


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
    """A path under output/ that no file has yet; ``prefix`` may hold a subfolder and %date% parts."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    while os.path.exists(full := os.path.join(folder, f"{name}_{counter:05}_{ending}")):
        counter += 1
    return full


def below_output(full: str) -> str:
    """``full`` as seen from output/, with forward slashes: what may be shown and shared."""
    return os.path.relpath(full, folder_paths.get_output_directory()).replace(os.sep, "/")


def listed_path(choice: str, folders: tuple[str, ...]) -> str:
    """The file of a "folder/name" choice. Raises ValueError unless the folder is one of ``folders``."""
    folder, _, name = choice.partition("/")
    if folder not in folders or not name:
        raise ValueError(f"{choice!r} is not one of the listed files. Choose one from the list")
    return path(folder, name)


def input_names(endings: tuple[str, ...]) -> list[str]:
    """Files with one of ``endings`` directly in the input folder."""
    folder = folder_paths.get_input_directory()
    found = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(n for n in found if n.lower().endswith(endings) and os.path.isfile(os.path.join(folder, n)))


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
