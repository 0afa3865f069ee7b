"""A float model to quantize, wherever it comes from: a single safetensors file, or a diffusers folder.

Both look alike from outside: native tensor names, shapes, and one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..families import by_diffusers_class, detect
from ..families.spec import FamilySpec, KeyRule
from . import folder, header, load, marks
from .errors import CheckpointError
from .formats import comfy_quant
from .lazy import LazyTensors

FLOATS = {"F16", "BF16", "F32", "F64"}
ORIGINAL = "Quantize the 16-bit original instead"


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
    _tensors: LazyTensors | None = None
    _uses: int = 0  # blocks that are in it: the files are open until the last one ends

    def __enter__(self) -> Source:
        if not self._uses:
            self._tensors = LazyTensors([(path, header.read(path)) for path in self.files], rename=False)
        self._uses += 1
        return self

    def __exit__(self, *exc) -> None:
        self._uses -= 1
        if not self._uses:
            self._tensors.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def get(self, name: str) -> Tensor:
        """One tensor under its native name, in memory of its own."""
        rule = self.rules.get(name)
        if rule is None:
            return self._tensors[name]
        parts = [self._tensors[s] for s in rule.sources]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        return torch.cat(value.chunk(2)[::-1]) if rule.swap_halves else value

    def dtype(self, name: str) -> torch.dtype:
        """What `get` gives, without reading: that of the widest where a native tensor is made of several."""
        sources = self.rules[name].sources if name in self.rules else (name,)
        return reduce(torch.promote_types, (self._tensors.dtype(s) for s in sources))


def open_source(path: str | Path) -> Source:
    """What is at ``path``: a safetensors file or one shard of several, a diffusers pipeline folder, or its
    unet/transformer folder.

    Raises CheckpointError for anything else, for a model that is quantized already, and for unknown diffusers classes.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    files = folder.files(path)
    if path.name.startswith(folder.STEM) and _known(folder.config(path)) is not None:
        return _from_folder(path.parent, files)
    head = _read(path.name, files)
    shapes = {n: e.shape for n, e in head.tensors.items()}
    family, prefix = detect(shapes)
    dtypes = {n: e.dtype for n, e in head.tensors.items()}
    return Source(path.name, family, prefix, files, shapes, dtypes, dict(head.metadata))


def _read(name: str, files: list[Path]) -> header.Header:
    """The headers of ``files`` as one. Raises CheckpointError naming the layer for a model that is quantized."""
    head = header.merged(name, map(header.read, files))
    listed = {layer: str(c.get("format")) for layer, c in load.file_level(head.metadata, name).items()}
    what = {n: (e.dtype, e.shape) for n, e in head.tensors.items()}
    found = marks.first_quantized(what, listed, lambda layer: _format(files, layer))
    if found is not None:
        raise CheckpointError(name, f"it is quantized already ({found[1]})", ORIGINAL, found[0])
    return head


def _format(files: list[Path], layer: str) -> str:
    """The format in a layer's own entry, as far as it is readable."""
    key = f"{layer}{comfy_quant.SUFFIX}" if layer else comfy_quant.SUFFIX[1:]
    for path in files:
        with safe_open(path, framework="pt") as f:
            if key in f.keys():  # noqa: SIM118
                try:
                    return comfy_quant.decode_config(f.get_tensor(key), path.name, layer)["format"]
                except CheckpointError:
                    break
    return "its comfy_quant entry says how"


def _known(config: Mapping) -> FamilySpec | None:
    """The family of a diffusers config whose names this version knows."""
    return by_diffusers_class(str(config.get("_class_name", "")), config)


def _from_folder(path: Path, files: list[Path] | None = None) -> Source:
    """The model of a diffusers folder. ``files``: those that were asked for, where there are others beside them."""
    inner = folder.denoiser_folder(path)
    name = f"{path.name}/{inner.name}" if inner != path else path.name
    config = folder.config(path)
    if not config:
        remedy = "Give a folder with unet/config.json or transformer/config.json, or a safetensors file"
        raise CheckpointError(name, "not a diffusers folder", remedy)
    files = files or folder.files(path)
    found = _read(name, files).tensors
    method = config.get("quantization_config")
    if isinstance(method, Mapping) and method:
        what = f"its config.json says that it is quantized ({str(method.get('quant_method', 'no method given'))[:60]})"
        raise CheckpointError(name, what, ORIGINAL)
    family = _known(config)
    if family is None:
        what = f"class {config.get('_class_name')!r} is not one whose names this version knows"
        raise CheckpointError(name, what, "Quantize the model's single-file checkpoint instead")
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
