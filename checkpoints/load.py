"""Reads 4-bit checkpoints into plain tensors: dense ones by name, and each 4-bit layer as one value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors.torch import load_file
from torch import Tensor

from . import header
from .errors import CheckpointError
from .formats import comfy_quant
from .formats.comfy_quant import StoredLayer


@dataclass(frozen=True)
class Checkpoint:
    """``dense``: every tensor that is not part of a 4-bit layer of ours; ``layers``: those, by full layer name."""

    name: str
    dense: dict[str, Tensor]
    layers: dict[str, StoredLayer]
    metadata: Mapping[str, str]


def load(path) -> Checkpoint:
    """The checkpoint at ``path``. Raises CheckpointError, see `parse` and `header.read`."""
    head = header.read(path)
    return parse(load_file(path), head.metadata, head.name)


def parse(tensors: dict[str, Tensor], metadata: Mapping[str, str] | None, name: str) -> Checkpoint:
    """Splits loaded ``tensors`` (consumed) into dense tensors and 4-bit layers. Raises CheckpointError naming the
    layer.

    Configurations that live only in ComfyUI's ``_quantization_metadata`` are taken as if each layer carried its own.
    """
    metadata = dict(metadata or {})
    for layer, config in _file_level(metadata, name).items():
        tensors.setdefault(layer + comfy_quant.SUFFIX, comfy_quant.encode_config(config))
    for key in tensors:
        if key.endswith(".qweight"):
            what = "its 4-bit layers are in nunchaku's packing, which this version does not read"
            raise CheckpointError(name, what, "Load it with the nunchaku nodes", key.removesuffix(".qweight"))
    return Checkpoint(name, tensors, comfy_quant.read(tensors, name), metadata)


def _file_level(metadata: Mapping[str, str], name: str) -> dict[str, dict]:
    text = metadata.get("_quantization_metadata")
    if text is None:
        return {}
    try:
        layers = json.loads(text)["layers"]
        return {str(k): dict(v) for k, v in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(name, f"its _quantization_metadata is not valid ({e})", header.AGAIN) from e
