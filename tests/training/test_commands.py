"""``nibble distill`` and ``nibble refine`` as a person types them, on the shipped model."""

import json

import pytest
import torch
from comfyui_nibble import demo
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.headless import pipeline
from comfyui_nibble.headless.cli import main
from comfyui_nibble.lora.apply import apply
from comfyui_nibble.lora.read import read
from safetensors.torch import load_file

PROMPTS = "red apple\nfox face\nrocket\nsunflower\n"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    path = tmp_path_factory.mktemp("q") / "demo-4bit.safetensors"
    assert main(["quantize", str(demo.MODEL), "--out", str(path), "--rank", "16"]) == 0
    return path


def prompts(folder) -> str:
    path = folder / "prompts.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return str(path)


def test_distill_writes_a_lora_for_every_layer(quantized, tmp_path, capsys):
    out = tmp_path / "one.safetensors"
    args = ["distill", "--way", "one_step", "--out", str(out), "--quantized", str(quantized), "--updates", "2"]
    args += ["--batch", "1", "--pairs", "1", "--teacher-steps", "2", "--prompts", prompts(tmp_path), "--rank", "4"]
    assert main([*args, "--samples", "4"]) == 0
    assert "one_step: " in capsys.readouterr().out
    pipe = pipeline.load_pipeline(demo.MODEL, "cpu")
    report = apply(pipeline.denoiser(pipe), read(load_file(out)), 1.0)
    assert len(report.applied) == 70 and not report.unknown and not report.named("shape")
    assert main([*args, "--samples", "4"]) == 1 and "a file of this name already" in capsys.readouterr().err


def test_refine_writes_the_same_codes(quantized, tmp_path, capsys):
    out = tmp_path / "refined.safetensors"
    args = [
        "refine",
        "--quantized",
        str(quantized),
        "--out",
        str(out),
        "--updates",
        "2",
        "--batch",
        "1",
        "--stops",
        "1",
    ]
    assert main([*args, "--prompts", prompts(tmp_path), "--samples", "4"]) == 0
    assert "output error" in capsys.readouterr().out
    one, two = load(out), load(quantized)
    assert one.layers.keys() == two.layers.keys() and len(one.layers) == 70
    assert all(torch.equal(one.layers[n].weight.qweight, two.layers[n].weight.qweight) for n in one.layers)
    moved = sum(not torch.equal(one.layers[n].weight.wscales, two.layers[n].weight.wscales) for n in one.layers)
    assert moved > 35 and one.layers[next(iter(one.layers))].weight.wscales.dtype == torch.float16
    record = json.loads(one.metadata["nibble"])
    assert record["refined"]["updates"] == 2 and record["rank"] == 16
    assert pipeline.install_file(pipeline.load_pipeline(demo.MODEL, "cpu"), out) == 70


def test_refine_needs_a_file(tmp_path, capsys):
    assert main(["refine", "--out", str(tmp_path / "x.safetensors")]) == 1
    assert "Refining needs a 4-bit file" in capsys.readouterr().err
