"""The few-step example workflows: valid on a real server; on small stand-ins or the demo model, also run."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from comfyui_nibble import demo
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
API = ROOT / "workflows" / "api"
NAMES = [
    "few-step", "few-step-parts", "sdxl-turbo", "lcm-lora-sd15", "flux-schnell", "lcm-dreamshaper", "instaflow",
    "perflow-sdxl",
]  # fmt: skip
# Input that names a file -> the folder it lies in
FOLDERS = {"ckpt_name": "checkpoints", "unet_name": "diffusion_models", "lora_name": "loras"}
OURS = [
    "NibbleFewStepPreset", "NibbleFewStepSampler", "NibbleSigmasFromTimesteps", "NibbleSamplerTCD",
    "NibbleSamplerPeRFlow", "NibbleModelSamplingRectifiedFlow", "NibbleLCMGuidance", "NibbleStraightness",
]  # fmt: skip
NEEDS_DEMO = pytest.mark.skipif(not (demo.MODEL / "unet").exists(), reason="the demo model is not there yet")


def read(name: str) -> dict:
    return json.loads((API / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def stand_ins(server):
    """stand_ins(graph): a file for every name in it that the server lacks; gone afterwards."""
    made = []

    def put(graph: dict) -> None:
        for n in graph.values():
            for key, folder in FOLDERS.items():
                if key in n["inputs"]:
                    path = server.models(folder) / n["inputs"][key]
                    if not path.exists():
                        save_file({"nothing": torch.zeros(1)}, path)
                        made.append(path)

    yield put
    for path in made:
        path.unlink()


@pytest.mark.parametrize("name", NAMES)
def test_is_valid_on_a_server(name, server, stand_ins):
    """Every node exists, every input is there and of its kind: ComfyUI takes the graph."""
    graph = read(name)
    stand_ins(graph)
    server.wait(server.queue(graph))  # the stand-ins hold no model, so how it ends does not matter here
    for n in graph.values():
        assert n["_meta"]["title"]
        for row in n["_meta"].get("models", []):
            assert row["url"].startswith("https://huggingface.co/") and row["name"] in n["inputs"].values()
            assert row["directory"] in FOLDERS.values()


def test_every_node_of_the_topic_is_shown():
    used = {n["class_type"] for name in NAMES for n in read(name).values()}
    assert used >= set(OURS)


def test_lcm_lora_runs_on_a_small_checkpoint(server, inside, tmp_path):
    """lcm-lora-sd15.json, the models being tiny ones of the same names and the picture 64 x 64."""
    graph = read("lcm-lora-sd15")
    inside("whole_checkpoint", tmp_path / "whole.safetensors")
    name = next(n["inputs"]["ckpt_name"] for n in graph.values() if "ckpt_name" in n["inputs"])
    shutil.copy(tmp_path / "whole.safetensors", server.models("checkpoints") / name)
    lora = next(n["inputs"]["lora_name"] for n in graph.values() if "lora_name" in n["inputs"])
    weights = {"diffusion_model.time_embed.2.lora_up.weight": torch.zeros(1280, 4),
               "diffusion_model.time_embed.2.lora_down.weight": torch.zeros(4, 1280)}  # fmt: skip
    save_file(weights, server.models("loras") / lora)
    for n in graph.values():
        if n["class_type"] == "EmptyLatentImage":
            n["inputs"] |= {"width": 64, "height": 64}
    result = server.done(graph)
    sampler = next(k for k, n in graph.items() if n["class_type"] == "NibbleFewStepSampler")
    assert result.text(sampler).startswith(f"preset lcm_lora_sd15: the file name {lora} matches LCM-LoRA")
    saved = next(k for k, n in graph.items() if n["class_type"] == "SaveImage")
    assert server.image(result, saved).shape == (64, 64, 3)


def install_lora(server) -> None:
    target = server.models("loras") / demo.LORAS["lcm"].name
    target.unlink(missing_ok=True)
    target.symlink_to(demo.LORAS["lcm"])


@NEEDS_DEMO
def test_few_step_draws_the_caption(server):
    """few-step.json on the demo model: both ways the same picture, and it shows a red apple."""
    from comfyui_nibble.demo import recognise

    install_lora(server)
    graph = read("few-step")
    result = server.done(graph)
    one, two = (server.image(result, k) for k, n in graph.items() if n["class_type"] == "SaveImage")
    assert (one == two).all()
    assert recognise.load("noto").recognised(one, "red apple")
    text = result.text(next(k for k, n in graph.items() if n["class_type"] == "PreviewAny"))
    assert text.startswith("preset lcm_lora_sd15: ")


@NEEDS_DEMO
def test_few_step_parts_run(server):
    graph = read("few-step-parts")
    result = server.done(graph)
    table = result.text(next(k for k, n in graph.items() if n["class_type"] == "PreviewAny"))
    value = float(table.split("S(Z) = ")[1].split()[0])
    assert math.isfinite(value) and value > 0
