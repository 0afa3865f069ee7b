"""The demo model in ComfyUI's own classes: UNetModel, SDClipModel, TAESD. Same weights as the diffusers folder."""

from __future__ import annotations

import json
from functools import partial

import comfy.clip_model
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import torch
from safetensors.torch import load_file

from ... import demo
from ...checkpoints.formats.comfy_quant import StoredLayer
from ...checkpoints.source import open_source
from ...quant.modules import quantize_weight
from ...quant.policy import plan
from ...quant.schemes import KEEP
from . import selfcheck
from .load import wrapped
from .operations import operations
from .patcher import claim

SD15_LATENT_SCALE = 0.18215  # what ComfyUI's SD15 latent format multiplies by; undone in the VAE's own scale


def _config(name: str) -> dict:
    return json.loads((demo.MODEL / name / "config.json").read_text(encoding="utf-8"))


def unet_config() -> dict:
    """ComfyUI's UNetModel arguments for the diffusers config of the demo's UNet."""
    c = _config("unet")
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


def model(four_bit: bool, rank: int = 16, disable_dynamic: bool = False):
    """The demo's diffusion model as an ordinary ModelPatcher, in 16 bits or quantized now, data-free, to 4 bits."""
    selfcheck.require()
    config = comfy.supported_models.SD15(unet_config())
    config.unet_config["num_heads"] = _config("unet")["attention_head_dim"]
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    compute = comfy.model_management.unet_manual_cast(None, device, config.supported_inference_dtypes)
    config.set_inference_dtype(torch.float16, compute)
    sd: dict[str, torch.Tensor] = {}
    with open_source(demo.MODEL) as source:
        shapes = {n.removesuffix(".weight"): s for n, s in source.shapes.items() if n.endswith(".weight")}
        plans = plan(shapes, source.family.rules, rank) if four_bit else {}
        sd = {name: source.get(name) for name in source}
    if four_bit:
        layers = {}
        for name, layer_plan in plans.items():
            if layer_plan.scheme != KEEP:
                weight, bias = sd.pop(f"{name}.weight"), sd.pop(f"{name}.bias", None)
                done = quantize_weight(weight, bias, layer_plan, weight.dtype)
                layers[name] = StoredLayer(done.weight)
                if done.bias is not None:
                    sd[f"{name}.bias"] = done.bias
        sd |= wrapped(layers)
        config.custom_operations = operations(compute)
    base = config.get_model(sd, "")
    class_ = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = class_(base, load_device=device, offload_device=offload)
    base.load_model_weights(sd, "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (model, (four_bit, rank))
    return claim(patcher)


class _TextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP text transformer over the demo's own vocabulary (ComfyUI fixes CLIP's 49,408 rows)."""

    def __init__(self, config, dtype, device, operations):
        super().__init__(config, dtype, device, operations)
        embeddings = self.text_model.embeddings
        rows = config["vocab_size"]
        embeddings.token_embedding = operations.Embedding(rows, config["hidden_size"], dtype=dtype, device=device)


def clip():
    """The demo's text encoder as an ordinary CLIP."""
    selfcheck.require()
    config = _config("text_encoder")
    start, end = config["bos_token_id"], config["eos_token_id"]

    class TextEncoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(
                device=device, dtype=dtype, textmodel_json_config=dict(config), model_class=_TextModel,
                special_tokens={"start": start, "end": end, "pad": end}, return_projected_pooled=False,
                model_options={**(model_options or {}), "model_name": "clip_l"},
            )  # fmt: skip

    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer, tokenizer_path=str(demo.MODEL / "tokenizer"), embedding_size=config["hidden_size"]
    )
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, clip_model=TextEncoder),
    )
    weights = load_file(demo.MODEL / "text_encoder" / "model.safetensors")
    weights = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in weights.items()}
    return comfy.sd.CLIP(target, state_dict=[weights])


def vae():
    """The demo's autoencoder as an ordinary VAE."""
    selfcheck.require()
    config = _config("vae")
    weights = load_file(demo.MODEL / "vae" / "diffusion_pytorch_model.safetensors")
    sd = {}
    for name, value in weights.items():
        half, _, index, rest = name.split(".", 3)
        # diffusers keeps the decoder's clamp outside its layers; TAESD counts it as layer 0.
        number = int(index) + (half == "decoder")
        sd[f"taesd_{half}.{number}.{rest}"] = value
    sd["vae_scale"] = torch.tensor(SD15_LATENT_SCALE / config["scaling_factor"])
    return comfy.sd.VAE(sd=sd)
