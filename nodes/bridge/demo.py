"""The demo model in ComfyUI's own classes: UNetModel, SDClipModel, TAESD, ClipVisionModel. Same weights as the
diffusers folder and the vision tower beside it.
"""

from __future__ import annotations

import json
from functools import partial

import comfy.clip_model
import comfy.clip_vision
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from safetensors.torch import load_file

from ... import demo
from ...checkpoints.formats.comfy_quant import StoredLayer
from ...checkpoints.source import open_source
from ...quant.modules import quantize_weight
from ...quant.policy import plan
from ...quant.schemes import KEEP
from . import demo_unet, selfcheck
from .demo_unet import config_of
from .load import wrapped
from .operations import operations
from .patcher import claim

SD15_LATENT_SCALE = 0.18215  # what ComfyUI's SD15 latent format multiplies by; undone in the VAE's own scale


def model(four_bit: bool, rank: int = 16, disable_dynamic: bool = False):
    """The demo's diffusion model as an ordinary ModelPatcher, in 16 bits or quantized now, data-free, to 4 bits."""
    selfcheck.require()
    with open_source(demo.MODEL) as source:
        shapes = {n.removesuffix(".weight"): s for n, s in source.shapes.items() if n.endswith(".weight")}
        plans = plan(shapes, source.family.rules, rank) if four_bit else {}
        sd: dict[str, torch.Tensor] = {name: source.get(name) for name in source}
    layers = {}
    for name, layer_plan in plans.items():
        if layer_plan.scheme != KEEP:
            weight, bias = sd.pop(f"{name}.weight"), sd.pop(f"{name}.bias", None)
            done = quantize_weight(weight, bias, layer_plan, weight.dtype)
            layers[name] = StoredLayer(done.weight)
            if done.bias is not None:
                sd[f"{name}.bias"] = done.bias
    patcher = demo_unet.build(sd | wrapped(layers), operations if four_bit else None, disable_dynamic)
    patcher.cached_patcher_init = (model, (four_bit, rank))
    return claim(patcher)


class _TextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP text transformer over the demo's own vocabulary (ComfyUI fixes CLIP's 49,408 rows)."""

    def __init__(self, config, dtype, device, operations):
        super().__init__(config, dtype, device, operations)
        embeddings = self.text_model.embeddings
        rows = config["vocab_size"]
        embeddings.token_embedding = operations.Embedding(rows, config["hidden_size"], dtype=dtype, device=device)


class _TextEncoder(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        config = config_of("text_encoder")
        start, end = config["bos_token_id"], config["eos_token_id"]
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=config,
            model_class=_TextModel,
            special_tokens={"start": start, "end": end, "pad": end},
            return_projected_pooled=False,
            model_options={**(model_options or {}), "model_name": "clip_l"},
        )


def clip():
    """The demo's text encoder as an ordinary CLIP, with the text projection that the vision tower was trained with.

    The projection is used by scores alone: a prompt's conditioning is that of the encoder without it.
    """
    selfcheck.require()
    width = config_of("text_encoder")["hidden_size"]
    tokenizer = partial(comfy.sd1_clip.SDTokenizer, tokenizer_path=str(demo.MODEL / "tokenizer"), embedding_size=width)
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, clip_model=_TextEncoder),
    )
    weights = load_file(demo.MODEL / "text_encoder" / "model.safetensors")
    weights = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in weights.items()}
    weights[demo.TEXT_PROJECTION] = load_file(_tower())[demo.TEXT_PROJECTION]
    return comfy.sd.CLIP(target, state_dict=[weights])


def _tower():
    return demo.VISION / "model.safetensors"


def vision():
    """The demo's vision tower as an ordinary CLIP_VISION. ComfyUI's loader knows towers by their number of layers, and
    this one has four; so its own configuration builds it. Raises ValueError when the file is not whole.
    """
    selfcheck.require()
    tower = comfy.clip_vision.ClipVisionModel(json.loads((demo.VISION / "config.json").read_text(encoding="utf-8")))
    weights = load_file(_tower())
    weights.pop(demo.TEXT_PROJECTION)
    missing, unknown = tower.load_sd(weights)
    if missing or unknown:
        raise ValueError(f"demo/vision/model.safetensors lacks {sorted(missing)} and holds {sorted(unknown)}, which no "
                         "tower of its config.json has: install the pack again")  # fmt: skip
    return tower


def vae():
    """The demo's autoencoder as an ordinary VAE."""
    selfcheck.require()
    config = config_of("vae")
    weights = load_file(demo.MODEL / "vae" / "diffusion_pytorch_model.safetensors")
    sd = {}
    for name, value in weights.items():
        half, _, index, rest = name.split(".", 3)
        # diffusers keeps the decoder's clamp outside its layers; TAESD counts it as layer 0.
        number = int(index) + (half == "decoder")
        sd[f"taesd_{half}.{number}.{rest}"] = value
    sd["vae_scale"] = torch.tensor(SD15_LATENT_SCALE / config["scaling_factor"])
    sd["vae_shift"] = torch.tensor(0.0)  # its own value, which ComfyUI misses in a file
    return comfy.sd.VAE(sd=sd)
