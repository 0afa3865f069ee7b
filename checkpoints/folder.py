"""Models of several files: shards with an index, diffusers folders, and nunchaku's older folders of two files.

A shard is ``<stem>-00001-of-00003.safetensors``; the index beside it, ``<stem>.safetensors.index.json``, says which
tensor is in which file. One shard stands for the whole model, never for itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from . import header
from .errors import CheckpointError

PARTS = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")  # nunchaku's, before single files
STEM = "diffusion_pytorch_model"
ENDINGS = (".safetensors", ".sft")
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.(?:safetensors|sft)", re.IGNORECASE)
INDEX = re.compile(r"(.+)\.(?:safetensors|sft)\.index(?:\.(\w+))?\.json", re.IGNORECASE)
MAX_JSON = 16 * 2**20
DENOISERS = ("transformer", "unet")
AGAIN = "Download the folder again"


def _json(path: Path) -> dict:
    """A small JSON object, {} where there is none. Raises CheckpointError for one that does not parse."""
    if not path.is_file() or path.stat().st_size > MAX_JSON:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as e:
        raise CheckpointError(path.name, f"not valid JSON ({str(e)[:80]})", AGAIN) from e
    return value if isinstance(value, dict) else {}


def denoiser_folder(path: Path) -> Path:
    """The folder that holds the denoiser's files."""
    if not path.is_dir():
        return path.parent
    return next((path / d for d in DENOISERS if (path / d / "config.json").is_file()), path)


def _of_folder(path: Path) -> bool:
    """Whether ``path`` is a folder, or a file that is only a part of one."""
    return path.is_dir() or path.name in PARTS or path.name.startswith(STEM)


def config(path: Path) -> Mapping:
    """The config.json of the folder that ``path`` is or belongs to, else {}."""
    return _json(denoiser_folder(path) / "config.json") if _of_folder(path) else {}


def files(path: Path) -> list[Path]:
    """Every file that belongs to the model at ``path``. Raises CheckpointError when some are not there."""
    base = denoiser_folder(path)
    shard = SHARD.fullmatch(path.name) if path.is_file() else None
    if shard:
        return _shards(path, shard)
    if not _of_folder(path):
        return [path]
    if (base / PARTS[0]).is_file() and path.name != STEM:
        return _present([base / p for p in PARTS])
    return _in_folder(path, base) if path.is_dir() else [path]


def _in_folder(path: Path, base: Path) -> list[Path]:
    """The files of the one model in the folder ``base``."""
    indexes = [f for f in base.iterdir() if INDEX.fullmatch(f.name)]
    if indexes:
        # diffusers keeps smaller variants (fp16) of a model beside it, with indexes of their own
        plain = [f for f in indexes if not INDEX.fullmatch(f.name)[2]] or indexes
        chosen = [f for f in plain if f.name.startswith(STEM)] or plain
        if len(chosen) == 1:
            return _listed(chosen[0])
        raise CheckpointError(path.name, f"the folder holds {len(chosen)} sharded models", "Give one of their files")
    whole = sorted(f for f in base.iterdir() if f.suffix.lower() in ENDINGS and f.is_file() and "non_ema" not in f.name)
    chosen = [f for f in whole if f.name in [STEM + e for e in ENDINGS]] or whole
    shard = next((f for f in chosen if SHARD.fullmatch(f.name)), None)
    if shard is not None:
        return _shards(shard, SHARD.fullmatch(shard.name))
    if len(chosen) != 1:
        what = f"the folder holds {len(whole)} safetensors files" if whole else "the folder holds no safetensors file"
        raise CheckpointError(path.name, what, "Give the model's own file")
    return chosen


def _shards(path: Path, name: re.Match) -> list[Path]:
    """All shards of the model that ``path`` is one of."""
    stem, number, count = name[1], int(name[2]), int(name[3])
    base, _, variant = stem.rpartition(".")
    names = [f"{stem}{e}.index.json" for e in ENDINGS]
    names += [f"{base}{e}.index.{variant}.json" for e in ENDINGS if base]
    index = next((path.parent / n for n in names if (path.parent / n).is_file()), None)
    if index is None and count == 1:
        return [path]
    if index is None:
        what = f"it is part {number} of {count} of a model, and {names[0]} is not beside it"
        raise CheckpointError(path.name, what, "Put that file and all parts in one folder, or join them into one file")
    found = _listed(index)
    if path.name not in {f.name for f in found}:
        raise CheckpointError(path.name, f"{index.name} beside it does not list it", AGAIN)
    return found


def _listed(index: Path) -> list[Path]:
    """The files that ``index`` lists. Raises CheckpointError unless each is there with the tensors it should hold."""
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(index.name, "it does not say where the model's tensors are", AGAIN)
    by_file: dict[str, list[str]] = {}
    for tensor, file in places.items():
        by_file.setdefault(str(file), []).append(tensor)
    if any(Path(n).name != n for n in by_file):
        raise CheckpointError(index.name, "it names files outside its folder", AGAIN)
    found = _present([index.parent / n for n in sorted(by_file)])
    seen: dict[str, str] = {}
    for path in found:
        tensors = header.read(path).tensors
        gone = next((t for t in by_file[path.name] if t not in tensors), None)
        if gone is not None:
            raise CheckpointError(path.name, f"{index.name} says that it holds {gone[:200]}, and it does not", AGAIN)
        twice = next((t for t in tensors if t in seen), None)
        if twice is not None:
            raise CheckpointError(path.name, f"{seen[twice]} holds this tensor too", AGAIN, twice)
        seen |= dict.fromkeys(tensors, path.name)
    return found


def _present(paths: list[Path]) -> list[Path]:
    for p in paths:
        if not p.is_file():
            raise CheckpointError(p.name, "this part of the folder is not there", AGAIN)
    return paths
