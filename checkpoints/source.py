"""A float model to quantize, wherever it comes from: a single safetensors file, or a diffusers folder.

Both look alike from outside: native tensor names, shapes, and one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from . import header
from .errors import CheckpointError
from .families import FamilySpec, KeyRule, by_diffusers_class, detect
from .formats import bnb

FLOATS = {"F16", "BF16", "F32", "F64"}
DENOISERS = ("transformer", "unet")


@dataclass
class Source:
    """``prefix``: where the model sits in the file; tensors outside it (text encoder, VAE) pass as they are."""

    name: str
    family: FamilySpec
    prefix: str
    files: list[Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    rules: dict[str, KeyRule] = field(default_factory=dict)  # native name -> where it is in a diffusers folder
    _stack: ExitStack = field(default_factory=ExitStack)
    _homes: dict[str, object] = field(default_factory=dict)

    def __enter__(self) -> Source:
        for path in self.files:
            f = self._stack.enter_context(safe_open(path, framework="pt"))
            self._homes |= dict.fromkeys(f.keys(), f)
        return self

    def __exit__(self, *exc) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def get(self, name: str) -> Tensor:
        """One tensor under its native name."""
        rule = self.rules.get(name)
        if rule is None:
            return self._homes[name].get_tensor(name)
        parts = [self._homes[s].get_tensor(s) for s in rule.sources]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        return torch.cat(value.chunk(2)[::-1]) if rule.swap_halves else value


def open_source(path: str | Path) -> Source:
    """What is at ``path``: a safetensors file, a diffusers pipeline folder, or its unet/transformer folder.

    Raises CheckpointError for anything else, for a model that is quantized already, and for unknown diffusers classes.
    """
    path = Path(path)
    source = _from_folder(path) if path.is_dir() else _from_file(path)
    for name, dtype in source.dtypes.items():
        if name.endswith((".comfy_quant", ".qweight")) or bnb.MARK in name:
            layer = name.split(bnb.MARK)[0] if bnb.MARK in name else name.rsplit(".", 1)[0]
            raise CheckpointError(source.name, "it is quantized already", "Quantize the 16-bit original instead", layer)
        if name.endswith(".weight") and dtype.startswith("F8"):
            layer = name.removesuffix(".weight")
            raise CheckpointError(
                source.name, f"its weights are {dtype}", "Quantize the 16-bit original instead", layer
            )
    return source


def _from_file(path: Path) -> Source:
    head = header.read(path)
    shapes = {n: e.shape for n, e in head.tensors.items()}
    family, prefix = detect(shapes)
    dtypes = {n: e.dtype for n, e in head.tensors.items()}
    return Source(path.name, family, prefix, [path], shapes, dtypes, dict(head.metadata))


def _from_folder(folder: Path) -> Source:
    home = next((folder / d for d in DENOISERS if (folder / d / "config.json").is_file()), folder)
    name = f"{folder.name}/{home.name}" if home != folder else folder.name
    try:
        config = json.loads((home / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        remedy = "Give a folder with unet/config.json or transformer/config.json, or a safetensors file"
        raise CheckpointError(name, "not a diffusers folder", remedy) from e
    family = by_diffusers_class(config.get("_class_name", ""), config)
    if family is None or family.key_rules is None:
        what = f"class {config.get('_class_name')!r} is not one whose names this version knows"
        raise CheckpointError(name, what, "Quantize the model's single-file checkpoint instead")
    files = sorted(home.glob("diffusion_pytorch_model*.safetensors"))
    plain = [f for f in files if ".fp16" not in f.name and ".non_ema" not in f.name]
    files = plain or files
    if not files:
        raise CheckpointError(name, "it holds no diffusion_pytorch_model*.safetensors", "Save the model as safetensors")
    heads = [header.read(f) for f in files]
    found = {n: e for h in heads for n, e in h.tensors.items()}
    shapes, dtypes, rules = {}, {}, {}
    for rule in family.key_rules(config):
        entries = [found.get(s) for s in rule.sources]
        if any(e is None for e in entries):
            continue  # a part this variant lacks: no guidance embedder, no bias, no q/k norm
        rows = sum(e.shape[0] for e in entries)
        shapes[rule.native] = (rows, *entries[0].shape[1:])
        dtypes[rule.native], rules[rule.native] = entries[0].dtype, rule
    unused = set(found) - {s for r in rules.values() for s in r.sources}
    if unused:
        layer = min(unused)
        raise CheckpointError(
            name, f"{len(unused)} tensors have names this version does not know", "Quantize its single file", layer
        )
    return Source(name, family, "", files, shapes, dtypes, {}, rules)
