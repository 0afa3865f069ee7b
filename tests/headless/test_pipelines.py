"""``nibble generate --model`` on small random pipelines of diffusers' own classes: each family by its own presets, with
its own way of naming guidance, from words, a picture and a mask.
"""

import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_nibble.headless import draw, few_steps, pipeline
from comfyui_nibble.headless.cli import main
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import tiny_pipelines

SIDE = ["--width", "64", "--height", "64"]
# family -> (style, multiple of pixels, ordinary steps and cfg, a preset, two steps' timesteps, and at strength .5)
KINDS = {
    "sd15": ("tags", 8, (25, 7.0), "hyper_sd15", [999, 499], [499, 249]),
    "sd2": ("tags", 8, (25, 7.0), "sd_turbo", [999, 899], [499, 399]),
    "sdxl": ("tags", 8, (25, 6.0), "lightning_sdxl", [999, 499], [499, 249]),
    "sd3": ("tags", 16, (28, 4.5), "sd35_large_turbo", [1000, 8.93], [602.2, 8.93]),
    "flux": ("prose", 16, (25, 1.0), "hyper_flux", [1000, 612.9], [612.9, 345.4]),
    "flux_schnell": ("prose", 16, (25, 1.0), "flux_schnell", [1000, 500], [500, 250]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, there = tmp_path_factory.mktemp("tiny"), {}

    def folder(kind: str) -> Path:
        if kind not in there:
            there[kind] = tiny_pipelines.write(kind, root / f"model-{len(there)}")  # a name that says nothing
        return there[kind]

    return folder


@pytest.fixture
def seen(monkeypatch):
    """(timestep of 0 ... 1000, guidance) of each evaluation."""
    told = []

    def listen(kind):
        forward = kind.forward

        def call(self, *args, **kwargs):
            t = kwargs.get("timestep", args[1] if len(args) > 1 else None)
            guidance = kwargs.get("guidance")
            value = float(torch.as_tensor(t).flatten()[0]) * (1000 if kind is FluxTransformer2DModel else 1)
            told.append((value, None if guidance is None else float(guidance.flatten()[0])))
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", call)

    for kind in (UNet2DConditionModel, SD3Transformer2DModel, FluxTransformer2DModel):
        listen(kind)
    return told


@pytest.fixture
def run(folders, tmp_path, capsys):
    """run(kind, arguments) -> (pictures, stderr)"""

    def generate(kind, *args, side=SIDE):
        command = ["generate", "red apple", "--model", str(folders(kind)), "--precision", "16-bit", *side]
        assert main([*command, *map(str, args), "--out", str(tmp_path / "out")]) == 0
        said = capsys.readouterr()
        return [np.asarray(Image.open(f)) for f in said.out.split("\n") if f.endswith(".png")], said.err

    return generate


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_known_of_a_pipeline(kind, folders):
    style, multiple, usual, *_ = KINDS[kind]
    pipe = pipeline.load_pipeline(folders(kind))
    assert few_steps.family(pipe) == few_steps.of_domain(pipe) == kind
    assert draw.style_of(pipe) == style and few_steps.usual(pipe) == usual
    from comfyui_nibble.headless.conditions import multiple_of

    assert multiple_of(pipe) == multiple


@pytest.mark.parametrize("kind", KINDS)
def test_a_preset_visits_its_timesteps_from_words_a_picture_and_a_mask(kind, run, seen, tmp_path):
    Image.new("RGB", (80, 80), "red").save(tmp_path / "red.png")
    Image.new("L", (80, 80), 255).save(tmp_path / "all.png")
    _, _, _, preset, words, half = KINDS[kind]
    args = ["--preset", preset, "--steps", 2]
    image = ["--image", tmp_path / "red.png", "--strength", 0.5]
    for more, want in (([], words), (image, half), ([*image, "--mask", tmp_path / "all.png"], half)):
        seen.clear()
        pictures, said = run(kind, *args, *more)
        assert [t for t, _ in seen] == pytest.approx(want, abs=0.6 if kind.startswith(("sd3", "flux")) else 0)
        assert pictures[0].shape == (64, 64, 3) and f"preset {preset}" in said


def test_a_flux_is_told_its_guidance_and_takes_a_negative_prompt(run, seen):
    run("flux", "--steps", 1)
    assert [g for _, g in seen] == [3.5]
    run("flux", "--steps", 1, "--guidance", 2, "--cfg", 2, "--negative", "a mug")
    assert [g for _, g in seen[1:]] == [2.0, 2.0]
    _, said = run("flux_schnell", "--steps", 1, "--preset", "none")
    assert seen[-1][1] is None and "preset" not in said


@pytest.mark.parametrize("more", [[], ["--lcm"]])
def test_a_full_lcm_is_known_by_its_guidance_embedding(more, run, seen, monkeypatch):
    told, embedding = [], StableDiffusionPipeline.get_guidance_scale_embedding

    def listen(self, w, **kwargs):
        told.append(float(w.flatten()[0]))
        return embedding(self, w, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "get_guidance_scale_embedding", listen)
    _, said = run("full_lcm", *more)
    assert [t for t, _ in seen] == [999, 759, 499, 259] and "preset lcm_full_sd15" in said
    run("full_lcm", *more, "--guidance", 5)
    assert told == [7.0, 4.0]  # omega counts from 0


def test_guidance_by_the_names_that_pipelines_have_for_it():
    class Plain:
        def __call__(self, prompt, guidance_scale=7.5): ...

    class ZImagePipeline:
        def __call__(self, prompt, guidance_scale=5.0): ...

    class Both:
        def __call__(self, prompt, true_cfg_scale=4.0, guidance_scale=None): ...

    class BuiltIn(Plain):
        pass

    for kind, cfg, guidance, want, own in (
        (Plain, 3.0, None, {"guidance_scale": 3.0}, 7.5),
        (ZImagePipeline, 1.0, None, {"guidance_scale": 0.0}, 6.0),
        (Both, 2.0, 3.5, {"true_cfg_scale": 2.0, "guidance_scale": 3.5}, 4.0),
        (Both, 1.0, None, {"true_cfg_scale": 1.0}, 4.0),
        (BuiltIn, 2.0, 4.0, {"guidance_scale": 4.0}, 1.0),
    ):
        pipe = kind()
        pipe.transformer = type("Net", (), {"config": {"guidance_embeds": kind is BuiltIn}})()
        takes = inspect.signature(kind.__call__).parameters
        assert pipeline.guided(pipe, takes, cfg, guidance) == want and pipeline.own_cfg(pipe) == own


def test_the_class_alone_says_schnell(run, seen):
    _, said = run("flux_schnell")
    assert "preset flux_schnell, the model's class FluxTransformer2DModel" in said
    assert [t for t, _ in seen] == pytest.approx([1000, 750, 500, 250], abs=0.6)


def test_a_domain_writes_prose_for_an_encoder_that_reads_it(run, monkeypatch):
    told, encode = [], FluxPipeline.encode_prompt

    def listen(self, prompt, *args, **kwargs):
        told.append(prompt)
        return encode(self, prompt, *args, **kwargs)

    monkeypatch.setattr(FluxPipeline, "encode_prompt", listen)
    run("flux_schnell", "--domain", "product-photo", "--steps", 1)
    assert told[0][0].startswith("A studio product photograph of red apple")


def test_a_domain_gives_the_size(run):
    pictures, _ = run("sd15", "--domain", "portrait", "--steps", 1, "--preset", "lcm_lora_sd15", side=[])
    from comfyui_nibble.prompts import domain

    width, height = domain.load("portrait").size("sd15")
    assert pictures[0].shape == (height, width, 3)


def test_what_diffusers_has_no_form_for_is_one_sentence(folders, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    args = ["generate", "x", "--model", str(folders("sd3")), "--precision", "16-bit", "--lcm", *SIDE]
    assert main([*args, "--out", str(tmp_path)]) == 1
    assert "--lcm: there is no LCM for SD 3" in capsys.readouterr().err
    args = ["generate", "x", "--model", str(folders("sd2")), "--precision", "16-bit", "--preset", "flux_schnell"]
    assert main([*args, "--out", str(tmp_path)]) == 1
    assert "this model is SD 2.x (class UNet2DConditionModel). Choose one of: lcm_sd21" in capsys.readouterr().err


def test_4_bits_where_no_layer_can_be_is_said(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "quantize", lambda *_: {})
    args = ["generate", "x", "--model", str(folders("sd3")), *SIDE, "--steps", "1"]
    assert main([*args, "--out", str(tmp_path)]) == 0
    assert "no layer of this model can be in 4 bits" in capsys.readouterr().err
