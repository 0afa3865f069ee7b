"""Loads quantized checkpoints as ComfyUI's own model classes: an ordinary MODEL, no wrapper around it.

Each layer in a format of this pack becomes one QuantizedTensor under ``<layer>.weight`` before ComfyUI looks at the
file, so its detection, parameter counts and device placement see the logical model. Layers in ComfyUI's own formats,
however a file marks them (each layer, its metadata, the old ``scaled_fp8``), go to ComfyUI's loader as it would see
them itself, so that they give the same output. A file without any is ComfyUI's to load.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, MutableMapping
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...checkpoints import forms
from ...checkpoints import load as checkpoints
from ...checkpoints.errors import CheckpointError
from ...checkpoints.formats import comfy_quant
from ...checkpoints.formats.stored import StoredLayer
from ...checkpoints.load import Checkpoint, parse
from ...checkpoints.save import kept_info
from ...quant import kernels, machine
from . import demo_unet, selfcheck
from .operations import NO_MEANING, operations
from .patcher import claim
from .save import RECORD_OF_FILE

log = logging.getLogger(__name__)
OTHER_LOADER = "Use the loader of the pack that made it, or ComfyUI's own"
WHOLE = "Download or write the file again"
OLD_MARK = "scaled_fp8"  # of fp8 files before ComfyUI 0.3.76


def read(path: str) -> Checkpoint:
    """The checkpoint at ``path`` through ComfyUI's reader (memory-mapped), or through the pack's own where layers are
    packed or named otherwise. Raises CheckpointError in one sentence.
    """
    selfcheck.require()
    if checkpoints.needs_reader(path):
        return checkpoints.load(path)
    name = Path(path).name
    tensors, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    return parse(_newly_marked(tensors, metadata), metadata, name, core=tuple(comfy.ops.QUANT_ALGOS))


def _newly_marked(tensors: MutableMapping[str, Tensor], metadata) -> MutableMapping[str, Tensor]:
    """``tensors`` of an old scaled-fp8 diffusion model as ComfyUI rewrites them, each layer with its own mark. (Text
    encoders it rewrites while it loads them.)
    """
    if metadata and "_quantization_metadata" in metadata:
        return tensors
    for prefix in {"", comfy.model_detection.unet_prefix_from_state_dict(tensors)}:
        if prefix + OLD_MARK in tensors:
            tensors, _ = comfy.utils.convert_old_quants(tensors, prefix, metadata={})
    return tensors


def wrapped(layers: dict[str, StoredLayer]) -> dict[str, Tensor]:
    """ComfyUI's view of this pack's layers, which leave ``layers``: one logical (N, K) weight each, and the mark of
    mixed layers.
    """
    out: dict[str, Tensor] = {}
    for layer in list(layers):
        stored = layers.pop(layer)
        weight = kernels.wrap(stored.weight, tiled=stored.tiled)
        out[f"{layer}.weight"] = weight
        out[f"{layer}.comfy_quant"] = comfy_quant.encode_config({"format": kernels.format_of(weight._layout_cls)})
    return out


def _is_quantized(sd: dict[str, Tensor], prefix: str = "") -> bool:
    """Whether any layer of the model under ``prefix`` is quantized, in a format of this pack's or ComfyUI's."""
    return any(n.startswith(prefix) and n.endswith(comfy_quant.SUFFIX) for n in sd)


def _say(sd: dict[str, Tensor], name: str) -> None:
    """Logs which formats of a model run natively here, and what happens to the others."""
    marks = {n: t for n, t in sd.items() if n.endswith(comfy_quant.SUFFIX) and t.numel()}
    formats = {comfy_quant.decode_config(t, name, n)["format"] for n, t in marks.items()}
    for line in forms.advice(formats, machine.here()):
        log.info("%s: %s", name, line)


def diffusion_model(path: str, disable_dynamic: bool = False):
    """A ModelPatcher for the diffusion model in ``path``, quantized or not. Raises CheckpointError."""
    checkpoint = read(path)
    sd = _without_prefix({**checkpoint.dense, **wrapped(checkpoint.layers)})
    quantized = _is_quantized(sd)
    _say(sd, checkpoint.name)
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
    model.attachments[RECORD_OF_FILE] = kept_info(checkpoint.metadata)
    model.cached_patcher_init = (diffusion_model, (path,))
    return claim(model)


def full_checkpoint(path: str, embeddings, disable_dynamic: bool = False):
    """(model, clip, vae) of a checkpoint whose diffusion model is quantized or not. Raises CheckpointError."""
    checkpoint = read(path)
    sd = {**checkpoint.dense, **wrapped(checkpoint.layers)}
    prefix = comfy.model_detection.unet_prefix_from_state_dict(sd)
    quantized = _is_quantized(sd, prefix)
    _say(sd, checkpoint.name)
    if quantized or checkpoints.needs_reader(path):
        options = model_options(sd, prefix, checkpoint.name) if quantized else {}
        out = _named(checkpoint, lambda: comfy.sd.load_state_dict_guess_config(
            sd, output_vae=True, output_clip=True, embedding_directory=embeddings, model_options=options,
            metadata=checkpoint.metadata, disable_dynamic=disable_dynamic))  # fmt: skip
    else:
        out = comfy.sd.load_checkpoint_guess_config(
            path, output_vae=True, output_clip=True, embedding_directory=embeddings, disable_dynamic=disable_dynamic
        )
    if out is None or out[0] is None:
        raise _unknown(checkpoint.name)
    model, clip, vae = out[:3]
    if clip is None:
        remedy = "Load it with Load 4-bit Model and load the text encoder and VAE separately"
        raise CheckpointError(checkpoint.name, "it holds a diffusion model only", remedy)
    check_complete(model, checkpoint.name)
    model.attachments[RECORD_OF_FILE] = kept_info(checkpoint.metadata)
    model.cached_patcher_init = (full_checkpoint, (path, embeddings), 0)
    return claim(model), clip, vae


def model_options(sd: dict[str, Tensor], prefix: str, name: str) -> dict:
    """ComfyUI's model_options for a state dict with wrapped layers: our operations, and the dense layers' own dtype."""
    config = _named_config(sd, prefix, name)
    device = comfy.model_management.get_torch_device()
    dtypes = config.supported_inference_dtypes
    compute = comfy.model_management.unet_manual_cast(None, device, dtypes)
    chosen = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(sd, prefix), supported_dtypes=list(dtypes)
    )
    plain = {k: v for k, v in sd.items() if k.startswith(prefix) and v.is_floating_point() and not kernels.is_ours(v)}
    dense = comfy.utils.weight_dtype(plain, prefix)
    widest = max((v.dtype.itemsize for v in plain.values()), default=0)
    keep = dense in (torch.float16, torch.bfloat16) and widest <= dense.itemsize < chosen.itemsize
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
    """Runs a ComfyUI loader and turns its list of layers that do not fit into one sentence about the first."""
    try:
        return call()
    except RuntimeError as e:
        text = str(e)
        size = re.search(r"size mismatch for (\S+?)\.(weight|bias)\b:? (.*)", text)
        if size is not None:
            what = f"its {size[2]} does not fit the model ({size[3].strip()})"
            raise CheckpointError(checkpoint.name, what, WHOLE, size[1]) from e
        codes = re.search(rf"(\S+)\.weight {NO_MEANING}", text)
        if codes is None:
            raise
        what = f"its weight {codes[0].partition(' ')[2]}"
        raise CheckpointError(checkpoint.name, what, "Take the model's own file, or write it again", codes[1]) from e


def _unknown(name: str) -> CheckpointError:
    return CheckpointError(name, "ComfyUI does not recognise the model in it", OTHER_LOADER)


def _without_prefix(sd: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = comfy.model_detection.unet_prefix_from_state_dict(sd)
    inner = comfy.utils.state_dict_prefix_replace(dict(sd), {prefix: ""}, filter_keys=True)
    return inner or sd
