"""Whole jobs on a GPU that is not there (tests/pretended_gpu.py): no product mixes devices, all is as on the CPU."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from comfyui_nibble.quant import kernels
from comfyui_nibble.quant.calib import engine, presets
from comfyui_nibble.quant.modules import install, moved, quantize_module
from comfyui_nibble.quant.policy import LayerPlan
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import pretended_gpu

DTYPES = (torch.bfloat16, torch.float16)
PLANS = {
    "0": LayerPlan("svdquant_w4a4", "", 8),
    "2": LayerPlan("svdquant_w4a4", "", 8, True),
    "4": LayerPlan("awq_w4a16", ""),
}


def model():
    torch.manual_seed(0)
    layers = nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 64)
    return nn.Sequential(*layers).requires_grad_(False)


def calibrated(module, preset, dtype, device):
    """Every layer of ``module`` solved on ``device``."""
    x = torch.randn(4, 96, 64, generator=torch.Generator().manual_seed(1)).to(device)

    def weight(name):
        layer = module.get_submodule(name)
        return layer.weight.detach(), layer.bias.detach()

    job = engine.Job(PLANS, presets.preset(preset), dtype, lambda: module(x), weight, device=device, promote=0.9)
    return engine.calibrate(module, job)


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for f in dataclasses.fields(value) for t in tensors_of(getattr(value, f.name))]


def tensors_of(value) -> list[torch.Tensor]:
    return tensors(value) if isinstance(value, torch.Tensor) or dataclasses.is_dataclass(value) else []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", presets.OFFERED)
def test_calibration(preset, dtype):
    expected = calibrated(model(), preset, dtype, "cpu")
    with pretended_gpu.on() as log:
        module = model().to("cuda")
        found = calibrated(module, preset, dtype, "cuda")
        for name, layer in found.items():
            assert not any(isinstance(t, pretended_gpu.OnGPU) for t in tensors(layer.solved.weight))
            weight, bias = moved(layer.solved.weight, "cuda"), layer.solved.bias.to("cuda")
            install(module.get_submodule(name), weight, bias, dtype)
        module(torch.randn(2, 64, dtype=dtype, device="cuda"))
        assert log.mixes == []
    for name in PLANS:
        got, want = tensors(found[name].solved.weight), tensors(expected[name].solved.weight)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True)), name


def test_data_free_in_place():
    with pretended_gpu.on() as log:
        module = model().to("cuda")
        quantize_module(module, PLANS, torch.bfloat16)
        assert all(kernels.is_ours(module.get_submodule(n).weight) for n in PLANS)
        assert module(torch.randn(2, 64, dtype=torch.bfloat16, device="cuda")).device.type == "cuda"
        assert log.mixes == []
