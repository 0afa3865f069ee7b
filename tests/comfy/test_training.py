"""Train LoRA in a real ComfyUI: every precision learns, the base stays as it was, and stock loaders read the file."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from comfyui_nibble import demo
from comfyui_nibble.headless.cli import main

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lora"))
from lora_graphs import lora_node, node

ROOT = Path(__file__).resolve().parents[2]
CORE = ("nvfp4", "convrot_w4a4", "asym_w4a8_int8", "int8_tensorwise")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four of the shipped pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = (demo.PICTURES / "captions.jsonl").read_text().splitlines()[:4]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    for line in lines:
        shutil.copy(demo.PICTURES / json.loads(line)["file_name"], folder)
    return folder


def test_models_of_every_precision_learn(inside, tiny, tiny_4bit, tmp_path):
    """VP and flow; dense, this pack's 4-bit, ComfyUI's own formats. Losses fall, nothing of the model changes."""
    files = {"sd15 4": tiny_4bit("sd15"), "sd3 16": tiny("sd3"), "sd3 4": tiny_4bit("sd3"),
             "flux 4": tiny_4bit("flux")}  # fmt: skip
    for target in CORE:
        out = files[f"sd3 {target}"] = tmp_path / f"{target}.safetensors"
        assert main(["quantize", str(tiny("sd3")), "--out", str(out), "--target", target]) == 0
    found = inside("train_models", *(f"{name}={path}" for name, path in files.items()))
    print(json.dumps(found))
    assert found.keys() == files.keys()
    for name, r in found.items():
        assert r["losses"][2] < r["losses"][0] and r["before, after"][1] < r["before, after"][0], name
        assert r["moved"] > 0.9 and r["as it was"] and r["forwards left"] == 0, name
        assert r["checkpointing differs by"] < 1e-4, name
        assert r["loaded before, differs by"] < 1e-4, name


def test_stopped_and_gone_on_with(inside, pictures, tmp_path):
    r = inside("train_resume", pictures, tmp_path)
    print(json.dumps(r))
    assert r["stopped"] and not r["file while stopped"] and r["left"] == [".safetensors"]
    assert r["first told"].startswith("step 4 of 6") and r["same file"] and r["nothing left"]
    left = "What was trained is kept, and the same run only writes it. Free some space, or choose another folder"
    assert r["no room anywhere"] == f"full.safetensors: it cannot be written (the disk is full). {left}"
    assert r["only written"] and r["no steps then"]
    assert r["codes"] and r["forwards left"] == 0 and r["keys"] == [["diffusion_model"], 3 * 70]
    assert "3 trained on, 1 held out" in r["report"] and r["chart"] == [640, 360]
    assert r["preview"] == [640, 360] and r["previewed"] > 40  # a picture stands in the chart's corner


def training(folder: str, precision: str = "4-bit", **options) -> dict:
    workflow = json.loads((ROOT / "workflows" / "api" / "train-lora.json").read_text())
    workflow["1"]["inputs"]["precision"] = precision
    workflow["2"]["inputs"] |= dict(folder=folder, steps=6, batch=2, name=f"loras/test-{precision}", **options)
    for sampler in ("6", "9"):
        workflow[sampler]["inputs"]["steps"] = 4
    workflow["latent"] = node("SaveLatent", samples=["9", 0], filename_prefix="train/test")
    workflow["name"] = node("PreviewAny", source=["2", 1])
    return workflow


@pytest.mark.parametrize("precision", ["4-bit", "16-bit"])
def test_the_file_loads_in_stock_loaders(server, pictures, precision):
    """On the base it was trained on, LoraLoader gives the very picture of the node's MODEL; it loads on the other."""
    target = server.base / "input" / "mine"
    if not target.exists():
        shutil.copytree(pictures, target)
    result = server.done(training("mine", precision))
    assert server.image(result, "11").shape == (128, 128, 3) and "steps" in result.text("12")
    name = result.text("name")
    assert (server.base / "output" / name).is_file()
    name = os.path.basename(name)
    latents = {}
    for base in ("4-bit", "16-bit"):
        for strength in (0.0, 1.0):
            graph = training("mine", base)
            graph = {k: v for k, v in graph.items() if k in ("1", "3", "4", "5", "9", "latent")}
            graph["2"] = lora_node(name, strength) | {}
            graph["2"]["inputs"]["model"] = ["1", 0]
            latents[base, strength] = server.latent(server.done(graph), "latent")
    assert torch.equal(latents[precision, 1.0], server.latent(result, "latent"))
    for base in ("4-bit", "16-bit"):
        assert not torch.equal(latents[base, 1.0], latents[base, 0.0])


def test_what_is_wrong_is_said_in_one_sentence(server):
    folder = server.base / "input" / "bare"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(demo.PICTURES / "1f34e.webp", folder)
    assert "1 of 1 pictures have no caption" in server.run(training("bare")).error
    refused = server.post("/prompt", {"prompt": training("../bare"), "client_id": server.client})
    assert "value_not_in_list" in json.dumps(refused)
