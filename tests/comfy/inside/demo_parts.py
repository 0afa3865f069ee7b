"""ARGS: a safetensors file with what diffusers and transformers computed. The demo's parts in ComfyUI's own classes."""

import importlib
import json

from _start import args
from safetensors.torch import load_file

import comfy.model_management as mm  # isort: skip

demo = importlib.import_module("nibble_pack.nodes.bridge.demo")
given = load_file(args[0])
scale = given["scaling_factor"] / demo.SD15_LATENT_SCALE  # of latents: ComfyUI's VAE side over the encoder's own


def worst(a, b) -> float:
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


clip, vae, model = demo.clip(), demo.vae(), demo.model(False)
tokens = clip.tokenize("red apple")
context = clip.encode_from_tokens_scheduled(tokens)[0][0]
mm.load_models_gpu([model])
unet = model.model.diffusion_model.float()
result = {
    "tokens": [t for t, _ in tokens["l"][0]] == given["tokens"].tolist(),
    "text": worst(context[0], given["context"]),
    "unet": worst(unet(given["x"], given["t"], given["context"].unsqueeze(0)), given["eps"]),
    "decode": worst(vae.decode(given["latent"] * scale), given["decoded"]),
    "encode": worst(vae.encode(given["picture"]), given["encoded"] * scale),
}
print(json.dumps(result))
