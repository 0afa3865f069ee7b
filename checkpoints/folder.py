"""Models of several files: diffusers folders with shards, and nunchaku's older folders of two files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .errors import CheckpointError

PARTS = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")  # nunchaku's, before single files
STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
MAX_JSON = 16 * 2**20
DENOISERS = ("transformer", "unet")


def _json(path: Path) -> dict:
    """A small JSON object, {} where there is none. Raises CheckpointError for one that does not parse."""
    if not path.is_file() or path.stat().st_size > MAX_JSON:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as e:
        raise CheckpointError(path.name, f"not valid JSON ({str(e)[:80]})", "Download the folder again") from e
    return value if isinstance(value, dict) else {}


def home(path: Path) -> Path:
    """The folder that holds the denoiser's files."""
    if not path.is_dir():
        return path.parent
    return next((path / d for d in DENOISERS if (path / d / "config.json").is_file()), path)


def _of_folder(path: Path) -> bool:
    """Whether ``path`` is a folder, or a file that is only a part of one."""
    return path.is_dir() or path.name in PARTS or path.name.startswith(STEM)


def config(path: Path) -> Mapping:
    """The config.json of the folder that ``path`` is or belongs to, else {}."""
    return _json(home(path) / "config.json") if _of_folder(path) else {}


def files(path: Path) -> list[Path]:
    """Every file that belongs to the model at ``path``. Raises CheckpointError when some are not there."""
    if not _of_folder(path):
        return [path]
    at = home(path)
    if (at / PARTS[0]).is_file() and path.name != STEM:
        return _present([at / p for p in PARTS])
    shards = _json(at / INDEX).get("weight_map")
    if isinstance(shards, dict) and (path.is_dir() or "-of-" in path.name):
        names = sorted({str(v) for v in shards.values()})
        if any(Path(n).name != n for n in names):
            raise CheckpointError(INDEX, "it names files outside its folder", "Download the folder again")
        return _present([at / n for n in names])
    if not path.is_dir():
        return [path]
    whole = sorted(at.glob("*.safetensors"))
    chosen = [f for f in whole if f.name == f"{STEM}.safetensors"] or whole
    if len(chosen) != 1:
        what = f"the folder holds {len(whole)} safetensors files" if whole else "the folder holds no safetensors file"
        raise CheckpointError(path.name, what, "Give the model's own file")
    return chosen


def _present(paths: list[Path]) -> list[Path]:
    for p in paths:
        if not p.is_file():
            raise CheckpointError(p.name, "this part of the folder is not there", "Download the folder again")
    return paths
