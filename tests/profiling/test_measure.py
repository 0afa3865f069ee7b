"""`nibble profile` on a tiny pipeline made here: what it measures, fits, predicts and writes."""

import argparse
import json

import pytest
import torch

pytest.importorskip("diffusers", reason="nibble profile runs diffusers pipelines: pip install diffusers")

from comfyui_nibble import demo
from comfyui_nibble.headless import measure, profile
from comfyui_nibble.profiling import calibrate, work


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """A diffusers folder of the demo's classes with random weights: four transformer blocks, 128-pixel pictures."""
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipe")
    letters = [chr(c) for c in range(97, 123)]
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({n: i for i, n in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(names), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ))  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=4, cross_attention_dim=64,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=AutoencoderTiny(), text_encoder=text,
        tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "pipe", safe_serialization=True)
    return folder / "pipe"


def arguments(*words: str):
    parser = argparse.ArgumentParser()
    profile.add_command(parser.add_subparsers())
    return parser.parse_args(["profile", *words])


@pytest.fixture(scope="module")
def result(pipeline_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "measured"
    args = arguments("--model", str(pipeline_folder), "--out", str(out), "--size", "64", "96", "--repeat", "1")
    return measure.profile(args)


def test_both_precisions_are_fitted_and_written(result):
    assert [r.key.weights for r in result.rows] == ["16-bit", "4-bit"]
    assert {r.key.family for r in result.rows} == {"sd15"} and {r.key.engine for r in result.rows} == {"diffusers"}
    assert all(r.runs == 4 and r.flops_per_second > 1e6 and r.context == 0 for r in result.rows)
    assert [p.name for p in result.files] == list(measure.FILES) and all(p.stat().st_size > 100 for p in result.files)
    assert calibrate.from_json(result.files[0].read_text()) == list(result.rows)
    assert "| 16-bit | 64 | 4 |" in result.files[1].read_text()


def test_memory_is_predicted_within_15_percent(result):
    """Two precisions at a size whose peak took part in the fit, and the simulation alone on a third."""
    for check in result.checks:
        assert check.predicted_bytes == pytest.approx(check.measured_bytes, rel=0.15)


def test_the_simulation_is_the_real_run_of_a_diffusers_model(pipeline_folder):
    bench = measure.Bench(arguments("--model", str(pipeline_folder)), "16-bit")
    for pixels in (64, 96, 128):
        simulated, peak = bench.evaluation(pixels)
        assert simulated.live == pytest.approx(peak, rel=0.02), pixels
    assert not bench.module._forward_pre_hooks


def test_steps_never_run_are_predicted(result):
    """Counts, not seconds: on a shared machine only the fit's own exactness and order can be promised."""
    assert [(c.precision, c.steps) for c in result.checks] == [
        ("16-bit", 4),
        ("16-bit", 10),
        ("4-bit", 4),
        ("4-bit", 10),
    ]
    for four, ten in zip(result.checks[::2], result.checks[1::2], strict=True):
        assert 0 < four.predicted < ten.predicted and 0 < four.measured < ten.measured


def test_wishes_that_cannot_be_measured(pipeline_folder, result):
    with pytest.raises(ValueError, match="two different step counts"):
        measure.profile(arguments("--steps", "4"))
    with pytest.raises(ValueError, match="a calibration in measured already"):
        measure.profile(arguments("--model", str(pipeline_folder), "--out", str(result.files[0].parent)))
    with pytest.raises(ValueError, match="not a diffusers pipeline"):
        measure.profile(arguments("--model", "nowhere", "--out", "nowhere"))


def test_the_parser_is_light():
    """The command line must start without torch: the work is imported when it is run."""
    import ast
    from pathlib import Path

    tree = ast.parse(Path(profile.__file__).read_text())
    imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert {getattr(n, "module", None) or n.names[0].name for n in imports} == {"__future__", "sys", "pathlib", "shown"}


@pytest.mark.skipif(not (demo.MODEL / "unet").exists(), reason="the demo model is not in this checkout")
def test_the_demo_model_is_the_default(tmp_path):
    args = arguments("--out", str(tmp_path / "o"), "--precision", "16-bit", "--size", "64", "--repeat", "1", "--check")
    found = measure.profile(args)
    assert found.rows[0].key.family == "sd15" and not found.checks


def test_the_simulation_asks_for_an_empty_model():
    with pytest.raises(ValueError, match="meta device"):
        work.simulate(torch.nn.Linear(2, 2), lambda: None)
