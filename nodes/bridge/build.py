"""Makes a new MODEL from an existing one with some of its layers 4-bit. The old one, which others may use, is not
touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...checkpoints.convert import stored_layer
from ...checkpoints.formats.comfy_quant import StoredLayer
from ...checkpoints.load import parse
from ...quant import kernels
from ...quant.awq import AWQWeight
from ...quant.calib.engine import Layer
from ...quant.svdquant import SVDQuantWeight
from .load import wrapped
from .operations import FourBitLinear, operations
from .patcher import claim

PREFIX = "diffusion_model."


def weight_of(model, name: str) -> torch.Tensor | None:
    """The tensor ``name`` (below the diffusion model) of a MODEL as it samples: float, patches (LoRA) merged, float32
    where a patch was applied. None where the model has no such tensor.
    """
    key = PREFIX + name
    layer, value = attribute(model.model, key.rpartition(".")[0]), attribute(model.model, key)
    value = model.backup[key].weight if key in model.backup else value
    if not isinstance(value, torch.Tensor):
        return None
    if isinstance(value, QuantizedTensor):
        value = _effective(layer, value)
    if key not in model.patches:
        return value.detach()
    merged = value.detach().to(torch.float32, copy=True)
    return comfy.lora.calculate_weight(model.patches[key], merged, key)


def make_room(need: int, device: torch.device) -> None:
    """Has ComfyUI move models off ``device`` until ``need`` bytes are free on it. On a CPU that would free nothing."""
    if device.type != "cpu":
        comfy.model_management.free_memory(need + comfy.model_management.extra_reserved_memory(), device)


def attribute(model, key: str):
    try:
        return comfy.utils.get_attr(model, key)
    except AttributeError:
        return None


def _effective(layer, weight: QuantizedTensor) -> torch.Tensor:
    """The (N, K) matrix that a quantized ``weight`` of ``layer`` stands for, in its logical dtype. A layer that scales
    its input first (ModelOpt's nvfp4) stands for the product of both.
    """
    dense, scale = kernels.dense(weight), getattr(layer, "pre_quant_scale", None)
    return (dense if scale is None else dense * scale.to(dense)).to(weight.dtype)


def patched_layers(model) -> set[str]:
    """The layers (names below the diffusion model) of a MODEL that a patch changes."""
    return {key.removeprefix(PREFIX).rpartition(".")[0] for key in model.patches}


def dense_state(model, without: set[str]) -> dict[str, torch.Tensor]:
    """The diffusion model's entries, patches merged, except every entry of the layers ``without``. What is no weight
    (an attention's settings, a counter) stays as it is.

    A layer in a format of ComfyUI's own stays in it unless a patch changes it; then it becomes 16-bit.
    """
    state = model.model.diffusion_model.state_dict()
    patched, out = patched_layers(model), {}
    for name, value in state.items():
        layer, _, end = name.rpartition(".")
        if layer in without:
            continue
        quantized = f"{layer}.comfy_quant" in state
        if quantized and layer in patched and end not in ("weight", "bias"):
            continue
        merged = None if quantized and layer not in patched else weight_of(model, name)
        if merged is None or not merged.is_floating_point():
            out[name] = value.detach() if isinstance(value, torch.Tensor) else value  # opaque: passed on as it is
        else:
            out[name] = merged.to(kept_dtype(value))
    return out


def kept_dtype(value: torch.Tensor) -> torch.dtype:
    """What a float weight ``value`` is kept in."""
    return value.dtype if value.is_floating_point() and value.dtype.itemsize > 1 else torch.bfloat16


def with_layers(model, layers: Mapping[str, Layer], dtype: torch.dtype):
    """A new ModelPatcher: ``model``'s class, sampling and options, with ``layers`` (name -> solved) in place."""
    state = dense_state(model, set(layers))
    ours: dict[str, StoredLayer] = {}
    for name, layer in layers.items():
        weight = layer.solved.weight
        if isinstance(weight, SVDQuantWeight | AWQWeight):
            ours[name] = StoredLayer(weight.to(dtype))
        else:
            state |= stored_layer(name, weight, dtype)
        if layer.solved.bias is not None:
            state[f"{name}.bias"] = layer.solved.bias.to(dtype)
    state |= wrapped(ours)
    return assemble(model, state)


@dataclass(frozen=True)
class Kind:
    """What a MODEL hands on to one that is made of it, without any of its weights: the new one, which can be made
    again, must not keep the old one in memory.

    ``stand_ins``: for each object patch that stands in for a layer, what makes such a one for another model's layer.
    """

    config: object
    type: object
    sampling: torch.nn.Module
    options: dict
    object_patches: dict
    stand_ins: dict[str, Callable]
    attachments: dict
    devices: tuple[torch.device, torch.device]


def kind_of(model) -> Kind:
    patches = model.object_patches
    stand_ins = {name: p.maker() for name, p in patches.items() if hasattr(p, "maker")}
    return Kind(
        config=_config(model.model.model_config),
        type=model.model.model_type,
        sampling=copy.deepcopy(model.object_patches_backup.get("model_sampling", model.model.model_sampling)),
        options=comfy.utils.deepcopy_list_dict(model.model_options),
        object_patches={name: p for name, p in patches.items() if name not in stand_ins},
        stand_ins=stand_ins,
        attachments=dict(model.attachments),
        devices=(model.load_device, model.offload_device),
    )


def _config(old):
    config = object.__new__(type(old))  # copy.copy stumbles over its __getattr__
    config.__dict__.update(old.__dict__)
    config.unet_config = dict(old.unet_config)
    return config


def assemble(model, state: dict[str, torch.Tensor], disable_dynamic: bool = False):
    """A ModelPatcher of ``model``'s kind around ``state`` (native names, wrapped 4-bit layers)."""
    return made(kind_of(model), state, disable_dynamic)


def made(kind: Kind, state: dict[str, torch.Tensor], disable_dynamic: bool = False):
    """`assemble` for what has been taken of a model."""
    config, (load_device, offload_device) = _config(kind.config), kind.devices
    compute = comfy.model_management.unet_manual_cast(None, load_device, config.supported_inference_dtypes)
    config.custom_operations = operations(compute)
    config.quant_config = {"mixed_ops": True}
    config.set_inference_dtype(kind.config.unet_config["dtype"], compute, device=load_device)
    state = {
        name: value.to(offload_device) if isinstance(value, torch.Tensor) else value for name, value in state.items()
    }
    base = config.get_model(state, "")
    class_ = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = class_(base, load_device=load_device, offload_device=offload_device)
    base.load_model_weights(dict(state), "", assign=patcher.is_dynamic())
    base.model_type = kind.type
    base.model_sampling = copy.deepcopy(kind.sampling)
    patcher.model_options = comfy.utils.deepcopy_list_dict(kind.options)
    stand_ins = {name: make(comfy.utils.get_attr(base, name)) for name, make in kind.stand_ins.items()}
    patcher.object_patches = kind.object_patches | stand_ins
    patcher.attachments = dict(kind.attachments)
    patcher.cached_patcher_init = (made, (kind, _as_loaded(state, base.diffusion_model)))
    return claim(patcher)


def _as_loaded(state: dict[str, torch.Tensor], module) -> dict[str, torch.Tensor]:
    """``state`` in ``module``'s own memory where that loaded a copy: no second one, and none of the older model's."""
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def own(name: str, value):
        loaded = held.get(name)
        plain = isinstance(value, torch.Tensor) and not isinstance(value, QuantizedTensor)
        same = plain and loaded is not None and not isinstance(loaded, QuantizedTensor)
        return loaded.detach() if same and loaded.shape == value.shape else value

    return {name: own(name, value) for name, value in state.items()}


COMPILED = "torch.compile"  # ComfyUI's key of the wrapper that TorchCompileModel adds
TWIN = "_nibble_twin"  # on a BaseModel of ComfyUI's layers: the same weights in this pack's


def with_branches(model):
    """``model``, or, where it has quantized layers of ComfyUI's own class, a clone of it on this pack's layers, which
    take a LoRA as a branch: ComfyUI would merge it and round again, or raises where it cannot quantize to the format.

    The clone shares the weights' memory, patches and options with ``model``. Models of other packs stay as they are,
    and those in which another node has put modules of its own. Raises ValueError for a compiled one, whose code is
    bound to the layers that it has.
    """
    if type(model) not in (comfy.model_patcher.ModelPatcher, comfy.model_patcher.ModelPatcherDynamic):
        return model
    base = model.model
    if not hasattr(base, "diffusion_model") or not any(map(_is_theirs, base.diffusion_model.modules())):
        return model
    if any(COMPILED in keys for keys in model.wrappers.values()):
        raise ValueError("This model is compiled, and a LoRA on it needs other layers. Put TorchCompileModel after it")
    if any(name.startswith("diffusion_model") for name in model.object_patches):
        return model
    held = base.__dict__.get(TWIN)  # in a tuple, for it is no part of the module
    if held is None:
        comfy.model_management.unload_model_and_clones(model)  # else what is read may hold another clone's LoRA
        state = dict(base.diffusion_model.state_dict())
        checkpoint = parse(state, None, "the connected model", core=tuple(comfy.ops.QUANT_ALGOS))
        held = (assemble(model, checkpoint.dense | wrapped(checkpoint.layers), not model.is_dynamic()),)
        base.__dict__[TWIN] = held
    return claim(model.clone(model_override=held[0].get_clone_model_override()))


def _is_theirs(module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, QuantizedTensor) and hasattr(module, "in_features") and not isinstance(module, FourBitLinear)
    )
