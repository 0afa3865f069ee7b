"""Saves a MODEL's diffusion model: 4-bit layers in the on-disk contract, patches (LoRA) baked in."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.model_management
import comfy.utils
from comfy.cli_args import args

from ...checkpoints import save
from ...checkpoints.formats import comfy_quant
from ...quant import kernels
from ...writing import room

PREFIX = "model.diffusion_model."
# Attachments of a MODEL: what it says of itself when it is saved; what the file said that it was loaded from.
RECORD_OF_MODEL, RECORD_OF_FILE = "nibble_record", "nibble_file_record"


def diffusion_model(model, path: str, prompt: dict | None, extra: dict | None) -> None:
    """Writes ``model`` to ``path`` with native names. The workflow goes into the metadata unless the user disabled
    that, or it is too large for a file that can be read again.
    """
    room.check_room(Path(path), kernels.held(model.model.diffusion_model))
    comfy.model_management.load_models_gpu([model])
    sd = model.state_dict_for_saving()
    tensors = {k.removeprefix(PREFIX): v.to("cpu") for k, v in sd.items()}
    # A patch without a low-rank form (DoRA, merges) leaves a dense layer, which has no such entry.
    entries = {k.removesuffix(comfy_quant.SUFFIX): v for k, v in tensors.items() if k.endswith(comfy_quant.SUFFIX)}
    schemes = sorted({comfy_quant.decode_config(v, path, n)["format"] for n, v in entries.items() if v.numel()})
    info = save.record(scheme=" + ".join(schemes) or "16-bit", saved_from="a workflow")
    info |= dict(getattr(model, "attachments", {}).get(RECORD_OF_MODEL, {}))
    graph = {}
    if not args.disable_metadata:
        graph = {k: json.dumps(v) for k, v in {"prompt": prompt, **(extra or {})}.items() if v is not None}
    save.save(path, tensors, graph | info, optional=graph.keys() - info.keys())
