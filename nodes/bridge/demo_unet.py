"""The demo's UNet as ComfyUI's own model: its configuration, and a MODEL from a state dict in native names.

ComfyUI's detection knows the published widths only, so a saved or calibrated demo model is recognised here, by shape.
"""

from __future__ import annotations

import json

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

from ... import demo


def config_of(part: str) -> dict:
    """The config.json of a part of the shipped diffusers folder."""
    return json.loads((demo.MODEL / part / "config.json").read_text(encoding="utf-8"))


def unet_config() -> dict:
    """ComfyUI's UNetModel arguments for the diffusers config of the demo's UNet."""
    c = config_of("unet")
    width = c["block_out_channels"]
    attends = [int("CrossAttn" in kind) for kind in c["down_block_types"]]
    outputs = [int("CrossAttn" in kind) for kind in c["up_block_types"] for _ in range(c["layers_per_block"] + 1)]
    return {
        "image_size": 32,
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "model_channels": width[0],
        "num_res_blocks": [c["layers_per_block"]] * len(width),
        "channel_mult": [w // width[0] for w in width],
        "num_heads": c["attention_head_dim"],
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "context_dim": c["cross_attention_dim"],
        "transformer_depth": attends,
        "transformer_depth_output": outputs[::-1],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "legacy": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }


def is_demo(sd: dict[str, torch.Tensor]) -> bool:
    """Whether ``sd`` (native names, 4-bit layers wrapped) has the demo UNet's shapes."""
    c = config_of("unet") if (demo.MODEL / "unet" / "config.json").is_file() else None
    first, attn = sd.get("input_blocks.0.0.weight"), sd.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    if c is None or first is None or attn is None:
        return False
    width = c["block_out_channels"]
    return tuple(first.shape[:2]) == (width[0], c["in_channels"]) and tuple(attn.shape) == (
        width[-1],
        c["cross_attention_dim"],
    )


def build(sd: dict[str, torch.Tensor], operations=None, disable_dynamic: bool = False):
    """A ModelPatcher of the demo's UNet with the weights ``sd``. ``operations(compute dtype)``: for 4-bit layers."""
    config = comfy.supported_models.SD15(unet_config())
    config.unet_config["num_heads"] = config_of("unet")["attention_head_dim"]
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    compute = comfy.model_management.unet_manual_cast(None, device, config.supported_inference_dtypes)
    config.set_inference_dtype(torch.float16, compute)
    if operations is not None:
        config.custom_operations = operations(compute)
    base = config.get_model(sd, "")
    class_ = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = class_(base, load_device=device, offload_device=offload)
    base.load_model_weights(sd, "", assign=patcher.is_dynamic())
    return patcher
