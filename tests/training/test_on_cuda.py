"""Training, refinement, LoftQ and conversion on a GPU that is not there (tests/pretended_gpu.py)."""

import sys
from pathlib import Path

import pytest
import torch
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.checkpoints.repack import Options, repack
from comfyui_nibble.quant import svdquant
from comfyui_nibble.quant.modules import quantize_module
from comfyui_nibble.quant.policy import LayerPlan
from comfyui_nibble.training import loftq
from comfyui_nibble.training.adapters import Adapters
from comfyui_nibble.training.eight_bit import in_8_bits
from comfyui_nibble.training.loop import Plan, train
from comfyui_nibble.training.tuned import Tuner
from safetensors.torch import save_file
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "comfy")]
import layout_files  # noqa: E402
import pretended_gpu  # noqa: E402

PLANS = {
    "0": LayerPlan("svdquant_w4a4", "", 8),
    "2": LayerPlan("svdquant_w4a4", "", 8, True),
    "4": LayerPlan("awq_w4a16", ""),
}


def four_bit(device: str) -> nn.Module:
    """Every kind of 4-bit layer, and a convolution."""
    torch.manual_seed(0)
    linears = nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 64)
    module = nn.Sequential(*linears, nn.Unflatten(-1, (4, 4, 4)), nn.Conv2d(4, 4, 3, padding=1)).requires_grad_(False)
    quantize_module(module, PLANS, torch.float32)
    return module.to(device) if device == "cuda" else module


def trained(device: str, job: str) -> list[torch.Tensor]:
    """What three updates leave of the trained parameters."""
    module, chance = four_bit(device), torch.Generator().manual_seed(1)
    x, target = torch.randn(8, 64, generator=chance).to(device), torch.randn(8, 4, 4, 4, generator=chance).to(device)
    what = Adapters(module, list(PLANS), rank=0 if job == "whole" else 4) if job != "refine" else Tuner(module)
    plan = Plan(job, steps=3, batch=8, lr=1e-2, optimizer="galore" if job == "galore" else "adamw")
    with in_8_bits(module), what.attached():
        train(plan, what.parameters(), lambda _step, _chance: (module(x) - target).square().mean())
    return [p.detach().cpu() for p in what.parameters()]


@pytest.mark.parametrize("job", ["lora", "whole", "refine"])
def test_a_trainer_stays_on_the_gpu_and_learns_the_same(job):
    expected = trained("cpu", job)
    with pretended_gpu.on() as log:
        found = trained("cuda", job)
        assert log.mixes == []
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS.values(), ids=lambda p: p.scheme + (" unsigned" if p.act_unsigned else ""))
def test_loftq_takes_a_bias_from_the_cpu(plan):
    """A model's bias waits in the computer's memory while its weight is solved on the GPU."""
    w, bias = torch.randn(64, 128), torch.randn(64)
    expected = loftq.solve(w, plan, 4, torch.float32)
    with pretended_gpu.on() as log:
        made = loftq.solve(w.to("cuda"), plan, 4, torch.float32)
        assert made.up.device.type == "cuda" and torch.allclose(made.up.cpu(), expected.up, atol=1e-5)
        if isinstance(made.weight, svdquant.SVDQuantWeight):
            stored = svdquant.stored_bias(made.weight, bias)
            want = svdquant.stored_bias(expected.weight, bias)
            assert torch.allclose(stored.cpu(), want, atol=1e-4)
            assert torch.allclose(svdquant.dense_bias(made.weight, stored.cpu()).cpu(), bias, atol=1e-4)
        assert log.mixes == []


def test_conversion_requantizes_unsigned_layers(tmp_path):
    """FLUX.1's second layer of a feed-forward reads a GELU's output: its bias takes a correction."""
    torch.manual_seed(0)
    tensors = {"single_blocks.0.linear1.weight": torch.randn(64, 64)}
    for name, (n, k) in {"img_mlp.0": (256, 64), "img_mlp.2": (64, 256), "img_attn.qkv": (192, 64)}.items():
        layer = layout_files.OURS["nf4"](torch.randn(n, k))
        tensors |= {f"double_blocks.0.{name}.{part}": t for part, t in layer.items()}
        tensors[f"double_blocks.0.{name}.bias"] = torch.randn(n)
    save_file(tensors, tmp_path / "in.safetensors")
    expected = load(repack(tmp_path / "in.safetensors", tmp_path / "cpu.safetensors", Options(True, 8)).path)
    with pretended_gpu.on() as log:
        out = repack(tmp_path / "in.safetensors", tmp_path / "gpu.safetensors", Options(True, 8, device="cuda"))
        assert log.mixes == [] and out.requantized == 3
    found = load(out.path)
    assert found.layers["double_blocks.0.img_mlp.2"].weight.act_unsigned
    for name, want in expected.dense.items():
        assert torch.equal(found.dense[name], want), name
