"""Folders of pictures or features under input/ and output/, chosen from a list and resolved again on every use."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import folder_paths
import numpy as np
import torch
from safetensors.torch import load_file

from ...checkpoints import header
from ...reading import picture, textfile
from ...writing import unfinished

NONE = "none"
DEPTH, MOST = 2, 500  # of the list of folders


def roots() -> dict[str, str]:
    return {"input": folder_paths.get_input_directory(), "output": folder_paths.get_output_directory()}


def choices() -> list[str]:
    """none, then every folder below input and output, not deep."""
    out = [NONE]
    for name, root in roots().items():
        for folder, below, _ in os.walk(root):
            relative = Path(folder).relative_to(root)
            shown = [d for d in below if not d.startswith(".") and d != unfinished.FOLDER]
            below[:] = sorted(shown) if len(relative.parts) < DEPTH else []
            out.append("/".join((name, *relative.parts)))
            if len(out) > MOST:
                return out
    return out


def resolve(choice: str) -> Path:
    """The folder of a choice. Raises ValueError for one outside input/ and output/ or one that is not there."""
    name, _, below = choice.partition("/")
    root = roots().get(name)
    if root is None:
        raise ValueError(f"{choice!r} is not one of the listed folders. Choose one from the list")
    path = Path(os.path.realpath(os.path.join(root, below)))
    if not path.is_relative_to(os.path.realpath(root)) or not path.is_dir():
        raise ValueError(f"{choice!r} is not a folder below {name}. Choose one from the list")
    return path


def fingerprint(choice: str) -> str:
    """Changes when a file of the folder does, so that a node that read it runs again."""
    if choice == NONE:
        return NONE
    entries = sorted((e.name, e.stat().st_mtime_ns) for e in os.scandir(resolve(choice)) if e.is_file())
    return hashlib.sha256(repr(entries).encode()).hexdigest()


@dataclass(frozen=True)
class Pictures:
    """Pictures of a batch or a folder, or features that a folder holds instead. ``captions``: of a folder, by .txt."""

    names: tuple[str, ...]
    batch: torch.Tensor | None = None
    files: tuple[Path, ...] = ()
    features: torch.Tensor | None = None
    captions: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Each picture as (1, H, W, 3); a folder's are read one by one."""
        if self.batch is not None:
            yield from (self.batch[i : i + 1] for i in range(len(self.batch)))
        else:
            yield from map(read, self.files)

    def __len__(self) -> int:
        return len(self.names)


def of_batch(images: torch.Tensor, name: str) -> Pictures:
    return Pictures(tuple(f"{name} {i + 1}" for i in range(len(images))), batch=images[..., :3])


def of_folder(choice: str) -> Pictures:
    """What a folder holds: pictures, else features. Raises ValueError when it holds neither."""
    folder = resolve(choice)
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in picture.ENDINGS and p.is_file())
    if files:
        texts = [p.with_suffix(".txt") for p in files]
        captions = tuple(map(textfile.caption_file, texts)) if all(map(Path.is_file, texts)) else ()
        return Pictures(tuple(p.name for p in files), files=tuple(files), captions=captions)
    stored = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" and p.is_file())
    if not stored:
        raise ValueError(f"{choice}: there is neither a picture nor a features file (safetensors) in it")
    features = torch.cat([features_of(p) for p in stored])
    return Pictures(tuple(f"row {i + 1}" for i in range(len(features))), features=features)


def features_of(path: Path) -> torch.Tensor:
    """The one (n, d) float matrix of a safetensors file. Raises ValueError for a file with none or several."""
    header.read(path)
    found = [t for t in load_file(path).values() if t.dim() == 2 and t.is_floating_point()]
    if len(found) != 1:
        raise ValueError(f"{path.name}: a features file holds one float matrix (pictures, features), not {len(found)}")
    return found[0].float()


def read(path: Path) -> torch.Tensor:
    """A picture as (1, H, W, 3) in [0, 1]. Raises ValueError for a file that is not one."""
    return torch.from_numpy(np.array(picture.read(path))).float().div_(255)[None]
