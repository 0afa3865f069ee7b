"""``nibble demo`` on the shipped model: the figures that README and the pack stand on."""

import json

import numpy as np
import pytest
from comfyui_nibble import demo
from comfyui_nibble.headless import pipeline
from comfyui_nibble.headless.cli import main
from PIL import Image


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def report(out):
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_the_layers_are_4_bit_and_small(report):
    assert report["quantized_layers"] >= 60
    assert report["rank"] == 16 and 0.25 < report["weights_ratio"] <= 0.45
    assert report["bytes"]["4-bit"] < report["bytes"]["16-bit"]


def test_both_precisions_draw_what_was_asked_and_nearly_the_same(report):
    assert report["psnr_db"] >= 25
    assert min(report["recognised"].values()) >= 0.75
    assert len(report["prompts"]) == 8 and all("flat style" in p for p in report["prompts"])


def test_both_loras_are_in_every_layer_they_name(report):
    assert set(report["loras"]) == {"style", "lcm"}
    for text in report["loras"].values():
        assert "unknown" not in text, text


def test_pictures_and_stages(out, report):
    for name in ("demo.png", "profile.png"):
        picture = np.asarray(Image.open(out / name).convert("RGB"), np.float32)
        assert min(picture.shape[:2]) > 200 and picture.std() > 20
    stages = {(s["name"], s["group"]) for s in report["stages"]}
    assert {("load", "16-bit"), ("sample", "16-bit"), ("quantize", "4-bit"), ("sample", "4-bit")} <= stages


def test_same_seed_same_pictures():
    pipe = pipeline.load_pipeline(demo.MODEL)
    pipeline.quantize(pipe, 16)
    one, two = (pipeline.sample(pipe, ["red apple"], 2, 1.0, 3)[0] for _ in range(2))
    assert np.array_equal(one, two)
