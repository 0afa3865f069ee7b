"""What ``nibble quantize`` writes, ``nibble generate`` draws with: every format, and what a stranger's file holds."""

import json

import pytest
import torch
from comfyui_nibble import demo
from comfyui_nibble.checkpoints import convert
from comfyui_nibble.checkpoints.errors import CheckpointError
from comfyui_nibble.checkpoints.formats.core_quant import StoredCore, write
from comfyui_nibble.checkpoints.inspect import inspect
from comfyui_nibble.families import by_id
from comfyui_nibble.headless import pipeline
from comfyui_nibble.headless.cli import main
from comfyui_nibble.metrics.images import mean_psnr
from comfyui_nibble.quant import kernels
from comfyui_nibble.quant.core_formats import quantize
from comfyui_nibble.quant.core_low_rank import CoreLowRankWeight, rows
from comfyui_nibble.quant.policy import TARGETS
from safetensors.torch import load_file, save_file

SAID = (*TARGETS, "awq_w4a16")
PROMPTS, STEPS, CFG, SEED = ["red apple, flat style", "fox face, flat style"], 4, 3.0, 7
PSNR = dict.fromkeys(TARGETS, 25.0) | {"int8_tensorwise": 40.0}


def pictures(file=None):
    pipe = pipeline.load_pipeline(demo.MODEL)
    if file is not None:
        pipeline.install_file(pipe, file)
    return pipeline.sample(pipe, PROMPTS, STEPS, CFG, SEED)


@pytest.fixture(scope="module")
def sixteen():
    return pictures()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A target's file, written once."""
    folder, done = tmp_path_factory.mktemp("targets"), {}

    def write(target):
        if target not in done:
            done[target] = folder / f"{target}.safetensors"
            assert main(["quantize", str(demo.MODEL), "--target", target, "--out", str(done[target])]) == 0
        return done[target]

    return write


def test_the_summary_says_what_is_in_the_file(tmp_path, capsys):
    for target, said in (("int8_tensorwise", "70 layers in int8_tensorwise,"),
                         ("svdquant_w4a4", " layers in svdquant_w4a4, ")):  # fmt: skip
        assert main(["quantize", str(demo.MODEL), "--target", target, "--out", str(tmp_path / target)]) == 0
        printed = capsys.readouterr().out
        assert said in printed and "4 bits" not in printed
        stored = inspect(tmp_path / target).totals()
        assert all(f"{t['layers']}" in printed and scheme in printed for scheme, t in stored.items() if scheme in SAID)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_written_is_drawn_with(target, written, sixteen):
    psnr = mean_psnr(sixteen, pictures(written(target)))
    assert psnr >= PSNR[target], f"{psnr:.1f} dB"


def test_a_mixed_file_is_drawn_with(tmp_path, written, sixteen):
    """Three formats side by side: the layers in turn from the files of three targets."""
    files = [load_file(written(t)) for t in ("svdquant_w4a4", "int8_tensorwise", "nvfp4")]
    layers = sorted(k.removesuffix(".comfy_quant") for k in files[0] if k.endswith(".comfy_quant"))
    turn = {layer: i % 3 for i, layer in enumerate(layers)}
    mixed = {k: v for f in files for k, v in f.items() if k.rpartition(".")[0] not in turn}
    for layer, i in turn.items():
        mixed |= {k: v for k, v in files[i].items() if k.rpartition(".")[0] == layer}
    path = tmp_path / "mixed.safetensors"
    save_file(mixed, str(path))
    assert mean_psnr(sixteen, pictures(path)) >= 25


def test_codes_without_a_mark_are_refused_by_name(tmp_path, written):
    """A file whose mark of one layer was lost: its codes are no weights."""
    tensors = load_file(written("int8_tensorwise"))
    mark = next(k for k in tensors if k.endswith(".comfy_quant"))
    del tensors[mark]
    path = tmp_path / "lost.safetensors"
    save_file(tensors, str(path))
    with pytest.raises(CheckpointError, match=mark.removesuffix(".comfy_quant")):
        pipeline.install_file(pipeline.load_pipeline(demo.MODEL), path)


def test_a_tensor_that_the_file_lacks_is_named(tmp_path, written):
    tensors = load_file(written("svdquant_w4a4"))
    del tensors[next(k for k in tensors if k.endswith("in_layers.0.weight"))]
    path = tmp_path / "short.safetensors"
    save_file(tensors, str(path))
    with pytest.raises(CheckpointError, match=r"norm1\.weight.*the file does not"):
        pipeline.install_file(pipeline.load_pipeline(demo.MODEL), path)


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "svdquant_w4a4"])
def test_rows_of_a_fused_layer_are_those_rows(target):
    """A native qkv is three layers of a diffusers pipeline: codes and scales are cut where the rows are."""
    weight = torch.randn(3 * 80, 256, generator=torch.Generator().manual_seed(1))
    layer = write("x", quantize(weight, target, torch.float32))
    config = json.loads(bytes(layer.pop("x.comfy_quant").tolist()))
    whole = StoredCore(config, {k.removeprefix("x."): v for k, v in layer.items()}).build(weight.shape, torch.float32)
    assert isinstance(whole, CoreLowRankWeight)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    want = torch.nn.functional.linear(x, kernels.wrap(whole, torch.float32))
    parts = [rows(whole, i, i + 80) for i in (0, 80, 160)]
    got = torch.cat([torch.nn.functional.linear(x, kernels.wrap(p, torch.float32)) for p in parts], -1)
    assert torch.allclose(got, want, atol=1e-4 * want.abs().max().item())


def test_a_target_of_comfyuis_own_is_measured_too(tmp_path, capsys):
    """Calibration says what such a file costs; the node always did."""
    out, prompts = tmp_path / "nvfp4.safetensors", tmp_path / "prompts.txt"
    prompts.write_text("red apple\n")
    args = ["--preset", "fast", "--target", "nvfp4", "--samples", "1", "--levels", "2", "--prompts", str(prompts)]
    assert main(["quantize", str(demo.MODEL), "--out", str(out), *args]) == 0
    assert "layers by preset fast" in capsys.readouterr().out
    assert inspect(out).totals()["nvfp4"]["layers"] > 0


@pytest.mark.parametrize(("dtype", "side"), [("float32", "float16"), ("float64", "float16"), ("bfloat16", "bfloat16")])
def test_side_dtype_is_the_familys_beside_wide_weights(dtype, side):
    assert convert.side_of(getattr(torch, dtype), by_id("sd15")) == getattr(torch, side)
