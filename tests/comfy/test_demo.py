"""The demo model in a real ComfyUI: the same parts as in diffusers, and pictures that show what was asked for."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_nibble import demo
from comfyui_nibble.demo import parts, recognise
from comfyui_nibble.headless import pipeline
from comfyui_nibble.metrics.images import psnr
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]


def quickstart(precision: str = "4-bit", text: str = "red apple") -> dict:
    graph = json.loads((ROOT / "workflows" / "api" / "quickstart.json").read_text(encoding="utf-8"))
    graph["1"]["inputs"]["precision"], graph["2"]["inputs"]["text"] = precision, text
    return graph


@torch.no_grad()
def test_comfyui_computes_what_diffusers_computes(inside, tmp_path):
    """Text encoder, UNet and autoencoder, each on the same input, in float32."""
    pipe, g = pipeline.load_pipeline(demo.MODEL), torch.Generator().manual_seed(0)
    ids = parts.token_ids(pipe.tokenizer, ["red apple"])
    given = {"tokens": ids[0], "context": pipe.text_encoder(ids).last_hidden_state[0]}
    given |= {"x": torch.randn(1, 4, 16, 16, generator=g), "t": torch.tensor([481])}
    given["eps"] = pipe.unet(given["x"], given["t"], given["context"][None]).sample
    given["picture"] = torch.rand(1, 128, 128, 3, generator=g)
    given["encoded"] = pipe.vae.encode(given["picture"].movedim(-1, 1) * 2 - 1).latents
    given["latent"] = given["encoded"] + 0.1 * torch.randn(1, 4, 16, 16, generator=g)
    given["decoded"] = (pipe.vae.decode(given["latent"]).sample.clamp(-1, 1).movedim(1, -1) + 1) / 2
    given["scaling_factor"] = torch.tensor(pipe.vae.config.scaling_factor)
    save_file({k: v.contiguous() for k, v in given.items()}, tmp_path / "given.safetensors")
    found = inside("demo_parts", tmp_path / "given.safetensors")
    assert found.pop("tokens")
    assert max(found.values()) < 1e-3, found


@pytest.mark.parametrize("text", ["red apple", "fox face"])
def test_the_quickstart_shows_what_it_says(text, server):
    """The workflow as it ships, and its 16-bit twin: recognised, and at least 28 dB apart from each other."""
    four, sixteen = (server.image(server.done(quickstart(p, text)), "7") for p in ("4-bit", "16-bit"))
    references = recognise.load()
    assert references.recognised(four, text) and references.recognised(sixteen, text)
    found = psnr(sixteen, four)
    print(text, found)
    assert 28 <= found < 60
    assert "['vae_shift']" not in server.log.read_text()  # ComfyUI warned of it at each load


def test_a_saved_demo_model_loads_again(server):
    """Saved from the graph, listed by the loader, recognised by shape, and drawing the same picture."""
    graph = quickstart()
    graph["save"] = {
        "class_type": "NibbleSaveModel",
        "inputs": dict(model=["1", 0], filename_prefix="diffusion_models/mine"),
    }
    result = server.done(graph)
    again = copy.deepcopy(quickstart())
    again["model"] = {"class_type": "NibbleLoadModel", "inputs": {"model_name": result.text("save").split("/")[1]}}
    again["5"]["inputs"]["model"] = ["model", 0]
    assert np.array_equal(server.image(result, "7"), server.image(server.done(again), "7"))


def test_a_float_file_of_it_loads_too(server):
    """16 bits through the same loader: nothing is quantized behind anybody's back."""
    from comfyui_nibble.checkpoints.source import open_source

    path = server.models("diffusion_models") / "demo16.safetensors"
    with open_source(demo.MODEL) as source:
        save_file({n: source.get(n) for n in source}, path)
    graph = quickstart("16-bit")
    expected = server.image(server.done(graph), "7")
    graph["model"] = {"class_type": "NibbleLoadModel", "inputs": {"model_name": path.name}}
    graph["5"]["inputs"]["model"] = ["model", 0]
    assert np.array_equal(server.image(server.done(graph), "7"), expected)
