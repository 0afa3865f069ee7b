"""Policies are data: the first rule that matches decides, and every decision has a reason."""

import pytest
import torch
from comfyui_nibble.families import spec
from comfyui_nibble.families.spec import Rule
from comfyui_nibble.quant import kernels
from comfyui_nibble.quant.modules import linear_shapes, quantize_module
from comfyui_nibble.quant.parts import take_rows
from comfyui_nibble.quant.policy import plan
from comfyui_nibble.quant.schemes import KEEP, SCHEMES

RULES = (
    Rule(r"mod$", "awq_w4a16", "modulation"),
    Rule(r"fc2$", "svdquant_w4a4", "reads a GELU", act_unsigned=True),
    Rule(r"fc\d$", "svdquant_w4a4", "feed-forward"),
    Rule(r"embed", KEEP, "embedder"),
)
SHAPES = {"a.mod": (128, 64), "a.fc1": (128, 64), "a.fc2": (64, 128), "embed": (64, 64), "x": (64, 64),
          "a.fc3": (64, 100), "conv": (8, 8, 3, 3), "b.fc1": (8, 64)}  # fmt: skip


def test_first_match_decides_and_says_why():
    out = plan(SHAPES, RULES, 16)
    assert {n: p.scheme for n, p in out.items()} == {
        "a.mod": "awq_w4a16", "a.fc1": "svdquant_w4a4", "a.fc2": "svdquant_w4a4", "embed": KEEP, "x": KEEP,
        "a.fc3": KEEP, "conv": KEEP, "b.fc1": "svdquant_w4a4",
    }  # fmt: skip
    assert out["a.fc2"].act_unsigned and not out["a.fc1"].act_unsigned
    assert out["a.fc3"].reason == "svdquant_w4a4 does not fit N=64, K=100"
    assert "4 dimensions" in out["conv"].reason and "no rule" in out["x"].reason and out["embed"].reason == "embedder"
    assert out["a.fc1"].rank == 16 and out["b.fc1"].rank == 8 and out["a.mod"].rank == 0


def test_rules_are_checked_when_written():
    with pytest.raises(ValueError, match="unknown scheme"):
        Rule("x", "w2a2", "")
    with pytest.raises(ValueError, match="only 4-bit activations"):
        Rule("x", "awq_w4a16", "", act_unsigned=True)
    with pytest.raises(ValueError, match="rank must be 0 or more"):
        plan(SHAPES, RULES, -1)


def test_quantizes_any_module_in_place(sqnr):
    model = torch.nn.Sequential()
    model.add_module("fc1", torch.nn.Linear(128, 256))
    model.add_module("act", torch.nn.GELU())
    model.add_module("fc2", torch.nn.Linear(256, 128))
    model.add_module("embed", torch.nn.Linear(128, 64))
    x = torch.randn(50, 128)
    with torch.no_grad():
        expected = model(x)
        seen = []
        errors = quantize_module(model, plan(linear_shapes(model), RULES, 32), torch.float32, progress=seen.append)
        assert sqnr(expected, model(x)) > 15
    assert seen == ["fc1", "fc2"] == list(errors) and all(0 < e < 0.2 for e in errors.values())
    assert kernels.is_ours(model.fc2.weight) and not kernels.is_ours(model.embed.weight)
    assert list(linear_shapes(model)) == ["embed"]


def test_families_name_the_schemes_that_there_are():
    assert {spec.SVDQUANT, spec.AWQ} == set(SCHEMES) and spec.KEEP == KEEP
    assert {id: row.act_bits for id, row in SCHEMES.items()} == {spec.SVDQUANT: 4, spec.AWQ: 16}


@pytest.mark.parametrize("scheme", ["svdquant_w4a4", "awq_w4a16"])
def test_rows_of_a_fused_weight(scheme, weight):
    """Splitting q/k/v out of a fused file loses nothing."""
    from comfyui_nibble.quant.modules import quantize_weight
    from comfyui_nibble.quant.policy import LayerPlan

    q = quantize_weight(weight(192, 64), None, LayerPlan(scheme, "", 16), torch.float32).weight
    x = torch.randn(4, 64)
    whole = torch.nn.functional.linear(x, kernels.wrap(q))
    parts = [torch.nn.functional.linear(x, kernels.wrap(take_rows(q, i, i + 64))) for i in (0, 64, 128)]
    assert torch.allclose(whole, torch.cat(parts, -1), atol=1e-6)
    with pytest.raises(ValueError, match="rows 0 to 193"):
        take_rows(q, 0, 193)
