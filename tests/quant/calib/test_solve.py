"""Whole layers: better than data-free or not kept, the same every time, and what a layer's kind asks for."""

import dataclasses

import pytest
import torch
from comfyui_nibble.quant import awq, core_formats, kernels, svdquant
from comfyui_nibble.quant.calib import presets
from comfyui_nibble.quant.calib.solve import Sample, output_error, solve
from comfyui_nibble.quant.policy import LayerPlan

from .layers import run, sample, synthetic


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("preset", ["fast", "best"])
def test_calibration_beats_the_weights_alone(preset, gelu):
    w, x = synthetic(256, 256, 2048, gelu)
    solved = run(preset, w, x[:1536], unsigned=gelu)
    test = x[1536:]
    free = run("data_free", w, None, unsigned=gelu)
    assert solved.calibrated and solved.error < 0.5 * solved.data_free
    assert output_error(test, w, solved.weight) < 0.5 * output_error(test, w, free.weight)


def test_a_layer_is_never_worse_than_data_free():
    """A recipe that does harm (here: a smoothing factor upside down) is measured, and not kept."""
    w, x = synthetic(128, 128, 600)
    broken = dataclasses.replace(presets.preset("fast"), shrink=0.0, refits=1)
    tokens = Sample(x, 1 / x.abs().amax(0).clamp(min=1e-3))
    few = Sample(torch.cat([x[:64], x[64:72] * 100]), tokens.maxima)
    for s in (tokens, few):
        solved = solve(w, None, s, LayerPlan("svdquant_w4a4", "", 16), broken, torch.bfloat16)
        assert solved.error <= solved.data_free
        if not solved.calibrated:
            free = run("data_free", w, None, rank=16).weight
            assert torch.equal(solved.weight.qweight, free.qweight)


def test_same_seed_same_bytes():
    w, x = synthetic(128, 192, 800)
    a, b, c = (run("best", w, x, seed=s).weight for s in (1, 1, 2))
    for field in ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up"):
        assert torch.equal(getattr(a, field), getattr(b, field))
    assert not torch.equal(a.proj_up, c.proj_up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_ships_runs_as_it_was_measured(dtype, sqnr):
    """Packed, wrapped and run by comfy-kitchen: the error is the one in the report."""
    w, x = synthetic(128, 256, 1024, gelu=True)
    bias = torch.randn(128)
    plan = LayerPlan("svdquant_w4a4", "", 16, True)
    solved = solve(w, bias, sample(x), plan, presets.preset("fast"), dtype)
    got = torch.nn.functional.linear(x.to(dtype), kernels.wrap(solved.weight), solved.bias.to(dtype)).float()
    y = torch.nn.functional.linear(x, w, bias)
    error = float((got - y).square().sum() / (y - y.mean(0)).square().sum())
    assert abs(error / output_error(x, w, solved.weight) - 1) < (0.02 if dtype == torch.float32 else 0.25)


def test_awq_layers_weigh_columns_by_their_input():
    w, x = synthetic(192, 128, 512)
    plan = LayerPlan("awq_w4a16", "modulation")
    solved = solve(w, None, sample(x), plan, presets.preset("fast"), torch.bfloat16)
    assert isinstance(solved.weight, awq.AWQWeight) and solved.calibrated
    assert solved.error < 0.8 * solved.data_free


@pytest.mark.parametrize("id", core_formats.FORMATS)
def test_comfyuis_own_formats(id):
    w, x = synthetic(128, 256, 256)
    solved = solve(w, None, sample(x), LayerPlan(id, ""), presets.preset("data_free"), torch.bfloat16)
    assert solved.weight._layout_cls == core_formats.FORMATS[id].layout
    assert 0 < solved.error < 0.6
    n, k = w.shape
    parts = kernels.tensors(solved.weight)
    assert core_formats.stored_bytes(id, n, k) == sum(t.numel() * t.element_size() for t in parts.values())


def test_core_formats_say_where_they_do_not_fit():
    with pytest.raises(ValueError, match="convrot_w4a4 does not fit a layer of N=64, K=40"):
        core_formats.quantize(torch.zeros(64, 40), "convrot_w4a4", torch.bfloat16)


def test_unsigned_bias_comes_with_the_weight(sqnr):
    w, x = synthetic(64, 128, 512, gelu=True)
    solved = run("fast", w, x, rank=8, unsigned=True)
    assert solved.bias is not None
    assert sqnr(x @ w.t(), svdquant.linear(x, solved.weight, solved.bias)) > 15


def test_few_tokens_fall_back():
    w, x = synthetic(64, 128, 4)
    assert not run("fast", w, x, rank=8).calibrated
