"""LoRAs on plain torch modules: every spelling finds its layer, 4-bit codes stay, the update is exact."""

import pytest
import torch
from comfyui_nibble.families.spec import Rule
from comfyui_nibble.lora.apply import apply
from comfyui_nibble.lora.read import read
from comfyui_nibble.quant import kernels
from comfyui_nibble.quant.modules import linear_shapes, quantize_module
from comfyui_nibble.quant.policy import plan

RULES = (Rule(r"to_k", "awq_w4a16", ""), Rule(r"to_q|net", "svdquant_w4a4", ""))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.ModuleDict({n: torch.nn.Linear(64, 64) for n in ("to_q", "to_k", "to_v")})
        self.net = torch.nn.ModuleList([torch.nn.Linear(64, 128)])

    def forward(self, x):
        return torch.cat([m(x) for m in [*self.attn.values(), *self.net]], -1)


def model(four_bit: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    out = torch.nn.Module()
    out.blocks = torch.nn.ModuleList([Block()])
    if four_bit:
        quantize_module(out, plan(linear_shapes(out), RULES, 8), torch.float32)
    return out


def lora(spelling: str, rank: int = 4, alpha: float | None = 2.0) -> dict[str, torch.Tensor]:
    """All four layers' LoRA in one of the layouts people have."""
    g = torch.Generator().manual_seed(1)
    out = {}
    for layer, n in (
        ("blocks.0.attn.to_q", 64),
        ("blocks.0.attn.to_k", 64),
        ("blocks.0.attn.to_v", 64),
        ("blocks.0.net.0", 128),
    ):
        name = {
            "kohya": "lora_unet_" + layer.replace(".", "_"),
            "diffusers": "unet." + layer,
            "old diffusers": "unet." + layer,
            "peft": "base_model.model." + layer,
            "comfyui": "diffusion_model." + layer,
        }[spelling]
        down, up = {
            "kohya": (".lora_down.weight", ".lora_up.weight"),
            "diffusers": (".lora_A.weight", ".lora_B.weight"),
            "old diffusers": (".lora.down.weight", ".lora.up.weight"),
            "peft": (".lora_A.weight", ".lora_B.weight"),
            "comfyui": (".lora_down.weight", ".lora_up.weight"),
        }[spelling]
        out[name + down] = torch.randn(rank, 64, generator=g)
        out[name + up] = torch.randn(n, rank, generator=g)
        if alpha is not None:
            out[name + ".alpha"] = torch.tensor(alpha)  # not the rank, so that scaling is really tested
    return out


@pytest.mark.parametrize("spelling", ["kohya", "diffusers", "old diffusers", "peft", "comfyui"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_adds_the_update_whatever_the_spelling(spelling, four_bit, sqnr):
    net, x = model(four_bit), torch.randn(5, 64)
    tensors = lora(spelling)
    codes = [m.weight._qdata.clone() for m in net.modules() if kernels.is_ours(getattr(m, "weight", None))]
    with torch.no_grad():
        before = net.blocks[0](x)
        report = apply(net, read(tensors), 0.5)
        after = net.blocks[0](x)
    down, up = (list(tensors.values())[i::3] for i in (0, 1))
    expected = torch.cat([0.5 * 2.0 / 4 * x @ d.t() @ u.t() for d, u in zip(down, up, strict=True)], -1)
    assert sqnr(expected, after - before) > 90
    assert len(report.applied) == 4 and report.summary() == "4 applied"
    still = [m.weight._qdata for m in net.modules() if kernels.is_ours(getattr(m, "weight", None))]
    assert all(torch.equal(a, b) for a, b in zip(codes, still, strict=True))


def test_branches_grow_to_what_kernels_take_at_once():
    """To multiples of 16, as those of ComfyUI's MODELs do."""
    net = model(True)
    for wide in (16, 32):
        apply(net, read(lora("kohya")), 1.0)
        layers = (net.blocks[0].attn["to_q"], *net.blocks[0].net)
        assert {kernels.unwrap(m.weight).proj_down.shape[1] for m in layers} == {wide}


def test_alpha_defaults_to_the_rank(sqnr):
    one, two = (read(lora("kohya", alpha=a)) for a in (None, 4.0))
    for name, weights in one.targets.items():
        assert torch.equal(weights.scaled(1.0)[1], two.targets[name].scaled(1.0)[1])


def test_strength_zero_changes_nothing():
    net, x = model(True), torch.randn(5, 64)
    with torch.no_grad():
        before = net.blocks[0](x)
        apply(net, read(lora("kohya")), 0.0)
        assert torch.equal(before, net.blocks[0](x))


def test_nothing_is_silently_ignored():
    tensors = lora("kohya")
    tensors["lora_unet_other_layer.lora_down.weight"] = torch.zeros(2, 8)
    tensors["lora_unet_other_layer.lora_up.weight"] = torch.zeros(8, 2)
    tensors["lora_unet_blocks_0_attn_to_q.lora_up.weight"] = torch.zeros(10, 4)
    tensors["lora_unet_x.hada_w1_a"] = torch.zeros(2, 2)
    report = apply(model(True), read(tensors), 1.0)
    assert report.unknown == ("lora_unet_other_layer",)
    assert report.named("shape") == ("lora_unet_blocks_0_attn_to_q",)
    assert report.unread == ("lora_unet_x.hada_w1_a",)
    assert report.summary() == (
        "3 applied, 1 unknown to this model, 1 of another shape than the layer, 1 without the other half"
    )
    assert report.why["lora_unet_blocks_0_attn_to_q.lora_up.weight"] == "made for 10 x 64, the layer has 64 x 64"
    assert report.why["lora_unet_x.hada_w1_a"] == "no hada_w1_b, hada_w2_a, hada_w2_b"
