"""ARGS: a safetensors file of what transformers computed. The demo's tower and text projection in ComfyUI's classes."""

import importlib
import json

from _start import args
from safetensors.torch import load_file

demo = importlib.import_module("nibble_pack.nodes.bridge.demo")
encoders = importlib.import_module("nibble_pack.nodes.bridge.clip")
given = load_file(args[0])


def worst(a, b) -> float:
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


vision, clip = demo.vision(), demo.clip()
output = vision.encode_image(given["pictures"])
print(json.dumps({
    "picture": worst(output["image_embeds"], given["seen"]),
    "hidden": worst(output["penultimate_hidden_states"], given["hidden"]),
    "text": worst(encoders.text_features(clip, ["red apple", "a fox, white background"]), given["called"]),
}))  # fmt: skip
