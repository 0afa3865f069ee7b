"""The demo's vision tower in a real ComfyUI: what transformers computes, and scores that mean something."""

import re
import shutil

import pytest
import torch
from comfyui_nibble import demo
from comfyui_nibble.demo import parts, tower
from comfyui_nibble.headless import pipeline
from safetensors.torch import save_file

TEXTS = ["red apple", "a fox, white background"]


@torch.no_grad()
def test_comfyui_computes_what_transformers_computes(inside, tmp_path):
    """Picture features and hidden states from 128 x 128 pixels, resizing included, and projected text features."""
    vision, projection = tower.load()
    pipe = pipeline.load_pipeline(demo.MODEL, "cpu")
    pictures = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    pixels = tower.normalised(tower.resized(pictures))
    found = vision(pixel_values=pixels, output_hidden_states=True)
    pooled = pipe.text_encoder(parts.token_ids(pipe.tokenizer, TEXTS)).pooler_output
    given = {"pictures": pictures.movedim(1, -1), "seen": found.image_embeds, "hidden": found.hidden_states[-2]}
    given["called"] = pooled @ projection.t()
    save_file({k: v.contiguous() for k, v in given.items()}, tmp_path / "given.safetensors")
    worst = inside("demo_vision", tmp_path / "given.safetensors")
    print(worst)
    assert max(worst.values()) < 2e-3, worst


def score(prompt: str) -> dict:
    """Score Pictures of a flat-style apple with the demo's encoders, another's picture as reference."""
    return {
        "demo": {"class_type": "NibbleLoadDemo", "inputs": {"precision": "16-bit", "rank": 16}},
        "apple": {"class_type": "LoadImage", "inputs": {"image": "nibble_apple.webp"}},
        "fox": {"class_type": "LoadImage", "inputs": {"image": "nibble_fox.webp"}},
        "s": {
            "class_type": "NibbleScores",
            "inputs": dict(folder="none", reference_folder="none", prompts=prompt, image_reward=False,
                           images=["apple", 0], references=["fox", 0], clip=["demo", 1], clip_vision=["demo", 3]),
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def scores(server):
    """{prompt: {"CLIP-T": ..., "CLIP-I": ...}} as the node's table says."""
    inputs = server.base / "input"
    inputs.mkdir(exist_ok=True)
    for name, file in (("nibble_apple", "1f34e.webp"), ("nibble_fox", "1f98a.webp")):
        shutil.copyfile(demo.PICTURES / file, inputs / f"{name}.webp")
    out = {}
    for prompt in ("red apple", "fox face"):
        text = server.done(score(prompt)).text("s")
        print(text)
        out[prompt] = {k: float(re.search(rf"{k}[^\n]*?(-?\d+\.\d+)", text)[1]) for k in ("CLIP-T", "CLIP-I")}
    return out


def test_a_picture_scores_higher_with_its_own_caption(scores):
    """Refused until the tower came with a text projection; now a figure, and the right way round."""
    assert scores["red apple"]["CLIP-T"] > scores["fox face"]["CLIP-T"] + 0.2


def test_another_emoji_is_no_twin(scores):
    assert scores["red apple"]["CLIP-I"] == scores["fox face"]["CLIP-I"] < 0.7


def test_old_workflows_keep_their_outputs(server):
    outputs = server.get("/object_info/NibbleLoadDemo")["NibbleLoadDemo"]["output"]
    assert outputs == ["MODEL", "CLIP", "VAE", "CLIP_VISION"]
