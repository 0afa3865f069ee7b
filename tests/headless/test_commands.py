"""The commands as a person types them, on the shipped model; every mistake is one sentence and exit status 1."""

import json
import re

import numpy as np
import pytest
import torch
from comfyui_nibble import demo
from comfyui_nibble.checkpoints.inspect import inspect
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.checkpoints.source import open_source
from comfyui_nibble.headless import pipeline
from comfyui_nibble.headless.cli import main, parser
from PIL import Image
from safetensors.torch import load_file, save_file

SMALL = ("svdquant_w4a4", "awq_w4a16", "int8_tensorwise")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    path = tmp_path_factory.mktemp("q") / "demo-4bit.safetensors"
    assert main(["quantize", str(demo.MODEL), "--out", str(path), "--rank", "16"]) == 0
    return path


def test_generate_from_a_quantized_file(quantized, tmp_path, capsys):
    args = ["generate", "fox face", "--model", str(demo.MODEL), "--quantized", str(quantized), "--steps", "2"]
    assert main([*args, "--out", str(tmp_path)]) == 0
    path = capsys.readouterr().out.split()[-1]
    assert np.asarray(Image.open(path)).shape == (128, 128, 3)


@pytest.mark.parametrize("extra, steps, cfg", [
    ([], 25, 3.0), (["--lcm"], 4, 1.0), (["--cfg", "2.5"], 25, 2.5), (["--lcm", "--cfg", "2"], 4, 2.0),
    (["--cfg", "1"], 25, 1.0)])  # fmt: skip
def test_generate_draws_at_its_guidance(extra, steps, cfg, tmp_path, monkeypatch):
    """3 unless a person says otherwise, 1 for few steps: what the sampler is really handed."""
    seen = []

    def sample(pipe, prompts, steps, scale, *_):
        seen.append((steps, scale, pipe.unet is not None))
        return [np.zeros((8, 8, 3), np.float32) for _ in prompts]

    monkeypatch.setattr(pipeline, "sample", sample)
    args = ["generate", "fox face", "--precision", "16-bit", "--out", str(tmp_path), *extra]
    assert main(args) == 0
    assert seen == [(steps, cfg, True)]


@pytest.mark.parametrize("command", ["quantize x --out y", "distill --out y", "refine --out y", "profile"])
def test_the_guidance_of_every_command_is_the_same(command):
    assert parser().parse_args(command.split()).cfg == 3.0


def test_help_says_the_defaults_that_are():
    """Every "(default 4)" of every command, numbers and words."""
    (commands,) = [a for a in parser()._actions if isinstance(a.choices, dict)]
    said = 0
    for name, sub in commands.choices.items():
        for option in sub._actions:
            found = re.search(r"\(default (\S+?)\)", option.help or "")
            if found and option.default is not None:
                value = option.default
                assert found[1] == (f"{value:g}" if isinstance(value, float) else str(value)), f"{name} {option.dest}"
                said += 1
    assert said > 20


def test_a_domain_and_a_lora(tmp_path, capsys):
    lora = f"{demo.LORAS['style']}:0.5"
    args = ["generate", "apple", "--domain", "emoji", "--lcm", "--steps", "1", "--lora", lora, "--out", str(tmp_path)]
    assert main(args) == 0
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_a_lora_of_which_a_part_is_not_read(tmp_path, capsys):
    """It is applied as far as it goes, and said on the error stream; a PEFT folder is a LoRA, too."""
    tensors = load_file(demo.LORAS["style"])
    save_file(tensors | {"unet.mid_block.x.ia3_l": torch.ones(4)}, tmp_path / "half.safetensors")
    args = ["generate", "apple", "--lcm", "--steps", "1", "--out", str(tmp_path)]
    assert main([*args, "--lora", str(tmp_path / "half.safetensors")]) == 0
    said = capsys.readouterr().err
    assert "nibble: half.safetensors: 70 applied, 1 of a kind that is not read (IA3)" in said
    (tmp_path / "half.safetensors").rename(tmp_path / "adapter_model.safetensors")
    assert main([*args, "--lora", str(tmp_path)]) == 0


def test_calibrate_with_a_budget_and_a_report(quantized, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\nfox face\n", encoding="utf-8")
    out, page = tmp_path / "fast.safetensors", tmp_path / "report.html"
    budget = quantized.stat().st_size / 2**20 + 0.3
    args = [
        "quantize",
        str(demo.MODEL),
        "--out",
        str(out),
        "--preset",
        "fast",
        "--prompts",
        str(prompts),
        "--levels",
        "2",
    ]
    assert main([*args, "--budget", f"{budget:.2f}", "--report", str(page)]) == 0
    assert "are calibrated" in capsys.readouterr().out
    assert out.stat().st_size <= budget * 2**20
    stored = inspect(out).totals()
    assert sum(t["layers"] for scheme, t in stored.items() if scheme in SMALL) >= 60, stored
    assert "data:image/png" in page.read_text(encoding="utf-8")
    assert not list(tmp_path.glob(".*"))
    record = json.loads(load(out).metadata["nibble"])["calibration"]
    assert record["method"] == "fast" and record["prompts"] == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["inspect", "nothing.safetensors"], "nothing.safetensors"),
        (["quantize", "{float}", "--out", "{new}", "--preset", "fast"], "a file without a pipeline"),
        (["quantize", "{file}", "--out", "{new}"], "quantized already"),
        (["quantize", "{model}", "--out", "{new}", "--budget", "5"], "add --preset fast or best"),
        (["quantize", "{model}", "--out", "{file}"], "There is a file of this name|there is a file of this name"),
        (["generate", "x", "--lora", "none.safetensors"], "none.safetensors: there is no such LoRA file"),
        (["generate", "x", "--lora", "{page}"], "page.safetensors: not a whole safetensors file"),
        (["prompts", "expand", "cars", "a red one"], "cars"),
    ],
)
def test_a_mistake_is_one_sentence(args, words, quantized, tmp_path, capsys):
    (tmp_path / "page.safetensors").write_bytes(b"<html>404 not found</html>" * 40)
    places = {"file": quantized, "new": tmp_path / "new.safetensors", "model": demo.MODEL, "float": tmp_path / "f.sft",
              "page": tmp_path / "page.safetensors"}  # fmt: skip
    with open_source(demo.MODEL) as source:
        save_file({n: source.get(n) for n in source}, places["float"])
    assert main([a.format(**places) for a in args]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("nibble: ") and any(w in error for w in words.split("|")), error
    assert not (tmp_path / "new.safetensors").exists()
