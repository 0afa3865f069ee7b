"""Checks the private ComfyUI names this pack builds on: an update ends in one clear sentence, not a traceback."""

from __future__ import annotations

import inspect
from functools import lru_cache

MINIMUM = (0, 33)


class UnsupportedComfyUI(RuntimeError):
    """This ComfyUI lacks something the pack needs."""


def missing() -> list[str]:
    """What this ComfyUI lacks, in words; empty when all is well."""
    import comfy.clip_vision
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_management
    import comfy.model_patcher
    import comfy.ops
    import comfy.sd

    patcher = comfy.model_patcher.ModelPatcher
    wanted = (
        (comfy.ops, "mixed_precision_ops", ("compute_dtype", "disabled")),
        (comfy.ops, "QUANT_ALGOS", ()),
        (comfy.ops, "CastBiasWeightContext", ()),
        (comfy.ops, "run_every_op", ()),
        (comfy.sd, "load_diffusion_model_state_dict", ("sd", "model_options", "metadata", "disable_dynamic")),
        (comfy.sd, "load_state_dict_guess_config", ("sd", "model_options", "metadata", "disable_dynamic")),
        (comfy.clip_vision, "ClipVisionModel", ("json_config",)),
        (comfy.model_management, "unet_manual_cast", ("weight_dtype", "inference_device", "supported_dtypes")),
        (comfy.model_management, "unload_model_and_clones", ("model",)),
        (patcher, "patch_weight_to_device", ("key", "return_weight", "force_cast")),
        (patcher, "get_key_patches", ("filter_prefix",)),
        (patcher, "clone", ("disable_dynamic", "model_override")),
        (patcher, "add_hook_patches", ("hook", "patches", "strength_patch", "strength_model")),
        (patcher, "patch_hook_weight_to_device", ("hooks", "combined_patches", "key", "original_weights")),
        (patcher, "patch_cached_hook_weights", ("cached_weights", "key")),
        (patcher, "unpatch_hooks", ("whitelist_keys_set",)),
        (patcher, "model_state_dict_for_saving", ("model", "prefix")),
        (comfy.model_patcher, "ModelPatcherDynamic", ()),
        (comfy.model_patcher, "LazyCastingParam", ()),
        (comfy.model_patcher, "LowVramPatch", ("key", "patches")),
        (comfy.model_patcher, "get_key_weight", ("model", "key")),
        (comfy.lora, "load_lora", ("lora", "to_load", "log_missing")),
        (comfy.lora, "calculate_weight", ("patches", "weight", "key", "original_weights")),
        (comfy.lora_convert, "convert_lora", ("sd",)),
    )
    return [problem for owner, name, names in wanted if (problem := _lacks(owner, name, names))]


def _lacks(owner, name: str, parameters: tuple[str, ...]) -> str:
    label = f"{getattr(owner, '__name__', owner)}.{name}"
    target = getattr(owner, name, None)
    if target is None:
        return label
    if not parameters:
        return ""
    lost = set(parameters) - set(inspect.signature(target).parameters)
    return f"{label}({', '.join(sorted(lost))})" if lost else ""


@lru_cache(maxsize=1)
def require() -> None:
    """Raises UnsupportedComfyUI with one sentence when this ComfyUI cannot run 4-bit models."""
    from comfyui_version import __version__ as version

    numbers = tuple(int(x) for x in version.split(".")[:2] if x.isdigit())
    low = ".".join(map(str, MINIMUM))
    if numbers < MINIMUM:
        raise UnsupportedComfyUI(f"Nibble needs ComfyUI {low} or newer, and this is {version}. Update ComfyUI.")
    lacking = missing()
    if lacking:
        what = ", ".join(lacking)
        raise UnsupportedComfyUI(
            f"This ComfyUI ({version}) changed what Nibble builds on ({what}). "
            f"Update ComfyUI-Nibble, or use ComfyUI {low}."
        )
