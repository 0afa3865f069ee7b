"""What a file says of itself in metadata and config.json, and layers that nothing here can read: refused by their
marks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .errors import CheckpointError
from .formats import bnb, nunchaku

Entries = Mapping[str, tuple[str, tuple[int, ...]]]
LITE = "nunchaku_lite"
MAKER = "Load it with the pack that made it"


@dataclass(frozen=True)
class Marks:
    """``config``: the diffusers config; ``quantization``: its or the metadata's quantization_config."""

    config: Mapping
    quantization: Mapping
    model_class: str = ""
    lite: bool = False


def _object(metadata: Mapping[str, str], key: str) -> dict:
    """{} for what is no JSON object: other programs keep other things under these names."""
    try:
        value = json.loads(metadata.get(key) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read(metadata: Mapping[str, str], config: Mapping | None, file: str) -> Marks:
    """The marks of a file. Raises CheckpointError for layouts that are not read here."""
    found = dict(config or _object(metadata, "config"))
    inner = found.get("quantization_config")
    quantization = inner if isinstance(inner, dict) else _object(metadata, "quantization_config")
    targets = quantization.get("targets")
    if isinstance(targets, list):
        _check_targets(targets, file)
    method = quantization.get("quant_method")
    if method == "sdnq":
        raise CheckpointError(file, "it is an SDNQ model, which this version does not read", "Load it with SDNQ")
    lite = method == LITE or isinstance(targets, list)
    return Marks(found, quantization, str(metadata.get("model_class", "")), lite)


def _check_targets(targets: list, file: str) -> None:
    """diffuse-compressor's files: "logical" layers have the packed ones' names and shapes, and other numbers."""
    for target in targets:
        layout = target.get("runtime_tensor_layout") if isinstance(target, dict) else None
        scheme = target.get("weight_layout") if isinstance(target, dict) else None
        kind = scheme.get("name") if isinstance(scheme, dict) else scheme
        if layout != "nunchaku_packed" or kind not in ("svdq", "awq_w4a16", None):
            what = f"diffuse-compressor wrote it in the layout {str(layout)[:40]!r} ({str(kind)[:40]}), not packed"
            raise CheckpointError(file, what, "Export it as nunchaku_packed, or load it with the pack that made it")


@dataclass(frozen=True)
class Stranger:
    """A kind of layer that is known by name and not read. ``test`` on {last name: (dtype, shape)}."""

    title: str
    test: Callable[[Mapping], bool]
    what: str
    remedy: str = MAKER


def _has(parts: Mapping, *names: str) -> bool:
    return all(n in parts for n in names)


STRANGERS = (
    Stranger(
        "kitchen svdquant_w4a4 without its description",
        lambda p: _has(p, "weight", "weight_scale", "proj_down", "proj_up") and "comfy_quant" not in p,
        "its SVDQuant layers have no comfy_quant entry, so nothing says how their activations are rounded",
        "Write the file again with its quantizer's ComfyUI export",
    ),
    Stranger(
        "NVFP4 without its description",
        lambda p: _has(p, "weight", "weight_scale", "weight_scale_2") and "comfy_quant" not in p
        and p["weight"][0] == "U8" and p["weight_scale"][0] == "F8_E4M3",
        "its NVFP4 layers have no comfy_quant entry, so nothing says in which order their scales lie",
        "Take the model's ComfyUI version, or export it again for ComfyUI",
    ),
    Stranger("SDNQ", lambda p: _has(p, "weight", "scale", "zero_point") or _has(p, "weight", "svd_up", "svd_down"),
             "it is an SDNQ layer, which this version does not read", "Load it with SDNQ"),
    Stranger(
        "integer weights without their description",
        lambda p: "comfy_quant" not in p and _has(p, "weight") and p["weight"][0] in ("I8", "U8")
        and (len(p["weight"][1]) > 1 or any(n.startswith("weight_") for n in p)),
        "its weights are integers, and it has no comfy_quant entry, so nothing says what they stand for",
        "Take the model's ComfyUI version, or export it again for ComfyUI",
    ),
    Stranger("HQQ", lambda p: _has(p, "W_q", "scale", "zero"), "it is an HQQ layer, which this version does not read"),
)  # fmt: skip


def layers_of(what: Entries) -> dict[str, dict[str, tuple]]:
    """Layer -> {last name: (dtype, shape)}."""
    out: dict[str, dict[str, tuple]] = {}
    for name, entry in what.items():
        layer, _, last = name.rpartition(".")
        out.setdefault(layer, {})[last] = entry
    return out


def refuse(what: Entries, marks: Marks, file: str) -> None:
    """Raises CheckpointError for the first layer that nothing here reads."""
    by_layer = layers_of(what)
    for layer, parts in by_layer.items():
        if "qweight" in parts and ("weight" in parts or "comfy_quant" in parts):
            raise CheckpointError(file, "two formats claim this layer", "Download or write the file again", layer)
        if "qweight" in parts:
            found = nunchaku.refusal(parts)
            if found is not None:
                raise CheckpointError(file, found[0], found[1], layer)
        stranger = next((s for s in STRANGERS if s.test(parts)), None)
        if stranger is not None and not bnb.detect(what):
            raise CheckpointError(file, stranger.what, stranger.remedy, layer)
    if not marks.lite:
        _refuse_lost_lite(by_layer, file)


def _refuse_lost_lite(by_layer: Mapping[str, Mapping], file: str) -> None:
    """A Lite file without its config.json looks like nunchaku's own, whose activations differ. Its q, k and v are
    apart.

    (attn2.to_q of a UNet stands alone in either.)
    """
    for layer, parts in by_layer.items():
        stem, _, last = layer.rpartition(".")
        if last == "to_k" and "qweight" in parts and "qweight" in by_layer.get(f"{stem}.to_q", {}):
            what = "it is part of a diffusers Nunchaku Lite folder, and the config.json of that folder is not beside it"
            raise CheckpointError(file, what, "Put the folder's config.json next to the file", layer)
