"""Loads 4-bit checkpoints as ComfyUI's own model classes: an ordinary MODEL, no wrapper around it.

Each 4-bit layer becomes one QuantizedTensor under ``<layer>.weight`` before ComfyUI looks at the file, so its
detection, parameter counts and device placement see the logical model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ...checkpoints import load as checkpoints
from ...checkpoints.errors import CheckpointError
from ...checkpoints.formats import comfy_quant
from ...checkpoints.formats.stored import StoredLayer
from ...checkpoints.load import Checkpoint, parse
from ...quant import kernels
from . import demo_unet, selfcheck
from .operations import operations
from .patcher import claim

log = logging.getLogger(__name__)
OTHER_LOADER = "Use the loader of the pack that made it, or ComfyUI's own"
WHOLE = "Download or write the file again"


def read(path: str) -> Checkpoint:
    """The checkpoint at ``path`` through ComfyUI's reader (memory-mapped), or through the pack's own where layers are
    packed or named otherwise. Raises CheckpointError in one sentence.
    """
    selfcheck.require()
    if checkpoints.needs_reader(path):
        return checkpoints.load(path)
    name = Path(path).name
    tensors, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    return parse(tensors, metadata, name)


def wrapped(layers: dict[str, StoredLayer]) -> dict[str, torch.Tensor]:
    """ComfyUI's view of 4-bit layers, which leave ``layers``: one logical (N, K) weight each, and the mark of mixed
    layers.
    """
    out: dict[str, torch.Tensor] = {}
    for layer in list(layers):
        stored = layers.pop(layer)
        weight = kernels.wrap(stored.weight, tiled=stored.tiled)
        fmt = kernels.OURS[weight._layout_cls]
        out[f"{layer}.weight"] = weight
        out[f"{layer}.comfy_quant"] = comfy_quant.encode_config(comfy_quant.config(fmt))
    return out


def diffusion_model(path: str, disable_dynamic: bool = False):
    """A ModelPatcher for the diffusion model in ``path``, 4-bit or not. Raises CheckpointError."""
    checkpoint = read(path)
    quantized = bool(checkpoint.layers or comfy_quant.detect(checkpoint.dense))
    sd = _without_prefix({**checkpoint.dense, **wrapped(checkpoint.layers)})
    if demo_unet.is_demo(sd):
        model = demo_unet.build(sd, operations if quantized else None, disable_dynamic)
    elif not quantized and not checkpoints.needs_reader(path):
        model = comfy.sd.load_diffusion_model(path, disable_dynamic=disable_dynamic)
    else:
        options = model_options(sd, "", checkpoint.name) if quantized else {}
        model = _named(checkpoint, lambda: comfy.sd.load_diffusion_model_state_dict(
            sd, model_options=options, metadata=checkpoint.metadata, disable_dynamic=disable_dynamic))  # fmt: skip
        if model is None:
            raise _unknown(checkpoint.name)
    if quantized:
        check_complete(model, checkpoint.name)
    model.cached_patcher_init = (diffusion_model, (path,))
    return claim(model)


def full_checkpoint(path: str, embeddings, disable_dynamic: bool = False):
    """(model, clip, vae) of a checkpoint whose diffusion model is 4-bit or not. Raises CheckpointError."""
    checkpoint = read(path)
    sd = {**checkpoint.dense, **wrapped(checkpoint.layers)}
    prefix = comfy.model_detection.unet_prefix_from_state_dict(sd)
    options = model_options(sd, prefix, checkpoint.name)
    out = _named(checkpoint, lambda: comfy.sd.load_state_dict_guess_config(
        sd, output_vae=True, output_clip=True, embedding_directory=embeddings, model_options=options,
        metadata=checkpoint.metadata, disable_dynamic=disable_dynamic))  # fmt: skip
    if out is None or out[0] is None:
        raise _unknown(checkpoint.name)
    model, clip, vae = out[:3]
    if clip is None:
        remedy = "Load it with Load 4-bit Model and load the text encoder and VAE separately"
        raise CheckpointError(checkpoint.name, "it holds a diffusion model only", remedy)
    check_complete(model, checkpoint.name)
    model.cached_patcher_init = (full_checkpoint, (path, embeddings), 0)
    return claim(model), clip, vae


def model_options(sd: dict[str, torch.Tensor], prefix: str, name: str) -> dict:
    """ComfyUI's model_options for a state dict with wrapped layers: our operations, and the dense layers' own dtype."""
    config = _named_config(sd, prefix, name)
    device = comfy.model_management.get_torch_device()
    dtypes = config.supported_inference_dtypes
    compute = comfy.model_management.unet_manual_cast(None, device, dtypes)
    chosen = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(sd, prefix), supported_dtypes=list(dtypes)
    )
    dense = comfy.utils.weight_dtype(
        {k: v for k, v in sd.items() if v.is_floating_point() and not kernels.is_ours(v)}, prefix
    )
    keep = dense in (torch.float16, torch.bfloat16) and dense.itemsize < chosen.itemsize
    return {"custom_operations": operations(compute), "dtype": dense if keep else chosen}


def check_complete(model, name: str) -> None:
    """Raises CheckpointError when a linear of the loaded model got no weight from the file."""
    for layer, module in model.model.diffusion_model.named_modules():
        if hasattr(module, "in_features") and getattr(module, "weight", None) is None:
            raise CheckpointError(name, "the model has this layer and the file does not", WHOLE, layer)


def _named_config(sd, prefix: str, name: str):
    try:
        config = comfy.model_detection.model_config_from_unet(sd, prefix)
        if config is None:
            config = comfy.model_detection.model_config_from_diffusers_unet(sd)
    except (AttributeError, KeyError, IndexError, TypeError, RuntimeError) as e:
        raise _unknown(name) from e
    if config is None:
        raise _unknown(name)
    return config


def _named(checkpoint: Checkpoint, call: Callable):
    """Runs a ComfyUI loader and turns its size-mismatch report into one sentence about one layer."""
    try:
        return call()
    except RuntimeError as e:
        bad = re.search(r"size mismatch for (\S+?)\.(weight|bias)\b:? (.*)", str(e))
        if bad is None:
            raise
        what = f"its {bad[2]} does not fit the model ({bad[3].strip()})"
        raise CheckpointError(checkpoint.name, what, WHOLE, bad[1]) from e


def _unknown(name: str) -> CheckpointError:
    return CheckpointError(name, "ComfyUI does not recognise the model in it", OTHER_LOADER)


def _without_prefix(sd: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = comfy.model_detection.unet_prefix_from_state_dict(sd)
    inner = comfy.utils.state_dict_prefix_replace(dict(sd), {prefix: ""}, filter_keys=True)
    return inner or sd
