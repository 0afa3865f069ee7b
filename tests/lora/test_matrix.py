"""Every kind of update at every place, on plain modules: equal to the float64 reference, or refused with the reason."""

import lora_files
import pytest
import torch
from comfyui_nibble.families.spec import KeyRule, Rule
from comfyui_nibble.lora.apply import apply
from comfyui_nibble.lora.read import read
from comfyui_nibble.quant import kernels
from comfyui_nibble.quant.modules import linear_shapes, quantize_module
from comfyui_nibble.quant.policy import plan
from lora_matrix import (
    CONVOLUTIONS,
    KINDS,
    PLACES,
    changed,
    convolution,
    halves_swapped,
    kind,
    refused,
    strength,
)

WIDTH = 64
# place -> (target, its layers, rows of the one layer that it is or None, the other spelling's rule or None)
SPOTS = {
    "same": ("a.same", ("a.same",), None, None),
    "fused on split": ("a.attn.to_qkv", tuple(f"a.attn.to_{x}" for x in "qkv"), None, None),
    "split on fused": (
        "b.to_k", ("a.qkv",), (WIDTH, WIDTH), KeyRule("a.qkv.weight", tuple(f"b.to_{x}.weight" for x in "qkv")),
    ),
    "swapped": ("b.norm.linear", ("a.mod",), None, KeyRule("a.mod.weight", ("b.norm.linear.weight",), True)),
}  # fmt: skip


def module(four_bit: bool) -> torch.nn.Module:
    torch.manual_seed(1)
    out = torch.nn.Module()
    out.a = torch.nn.Module()
    out.a.same, out.a.mod = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(WIDTH, 2 * WIDTH)
    out.a.qkv, out.a.attn = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Module()
    for x in "qkv":
        setattr(out.a.attn, f"to_{x}", torch.nn.Linear(WIDTH, WIDTH))
    out.a.conv, out.a.norm = torch.nn.Conv2d(16, 32, 3), torch.nn.LayerNorm(24)
    if four_bit:
        rules = (Rule(r"to_k|mod", "awq_w4a16", ""), Rule(r"same|qkv|to_", "svdquant_w4a4", ""))
        quantize_module(out, plan(linear_shapes(out), rules, 8), torch.float32)
    return out


def state(net: torch.nn.Module) -> dict:
    """Name -> (weight, bias) of every layer, in float64."""
    dense = lambda w: (kernels.dense(w) if kernels.is_ours(w) else w).detach().double()  # noqa: E731
    return {n: (dense(m.weight), dense(m.bias)) for n, m in net.named_modules() if hasattr(m, "weight")}


def check(net, target: str, tensors: dict, before: dict, expected: dict, rules, at: float) -> float:
    """Applies ``tensors`` and compares every layer; the largest error in sizes of the change."""
    report = apply(net, read({f"{target}{end}": t for end, t in tensors.items()}), at, rules=rules)
    assert set(report.status.values()) == {"model"}, report
    assert set(report.status) == {f"{target}{end}" for end in tensors}
    after, worst = state(net), 0.0
    for layer, (w, b) in after.items():
        for got, was, want in zip((w, b), before[layer], expected.get(layer, before[layer]), strict=True):
            if torch.equal(want, was):
                assert torch.equal(got, was), layer
            else:
                worst = max(worst, ((got - want).norm() / (want - was).norm()).item())
    return worst


@pytest.mark.parametrize("four_bit", [False, True], ids=["16-bit", "4-bit"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", KINDS)
def test_linears(name, place, four_bit):
    target, layers, rows, rule = SPOTS[place]
    net = module(four_bit)
    before = state(net)
    w, b = (torch.cat([before[layer][i] for layer in layers]) for i in (0, 1))
    if rows is not None:
        w, b = w.narrow(0, *rows), b.narrow(0, *rows)
    if place == "swapped":
        w, b = halves_swapped(w), halves_swapped(b)
    piece = len(w) // {"same": 1, "split on fused": 1, "fused on split": 3, "swapped": 2}[place]
    tensors, rules = kind(name, *w.shape, piece), [] if rule is None else [rule]
    why_not = refused(name, place, comfyui=False)
    if why_not is not None:
        report = apply(net, read({f"{target}{end}": t for end, t in tensors.items()}), rules=rules)
        assert {report.status[k] for k in report.status} == {why_not[0]}
        assert all(why.startswith(why_not[1]) for why in report.why.values()) and set(report.why) == set(report.status)
        return
    new = changed(tensors, w, b, strength(name), comfyui=False)
    if place == "swapped":
        new = [halves_swapped(x) for x in new]
    expected = {}
    for i, layer in enumerate(layers):
        if rows is not None:
            expected[layer] = [x.clone() for x in before[layer]]
            for whole, some in zip(expected[layer], new, strict=True):
                whole.narrow(0, *rows).copy_(some)
        else:
            expected[layer] = [x.chunk(len(layers))[i] for x in new]
    error = check(net, target, tensors, before, expected, rules, strength(name))
    print(f"{name} | {place} | {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    net = module(False)
    before = state(net)
    tensors = convolution(name, 32, 16)
    expected = {"a.conv": changed(tensors, *before["a.conv"], strength(name), comfyui=False)}
    error = check(net, "a.conv", tensors, before, expected, [], strength(name))
    print(f"{name} | convolution | {error:.1e}")
    assert error < 1e-5


def test_norms():
    net, g = module(False), lora_files.generator()
    before = state(net)
    tensors = {".w_norm": torch.randn(24, generator=g), ".b_norm": torch.randn(24, generator=g)}
    expected = {"a.norm": [b + 0.5 * t.double() for b, t in zip(before["a.norm"], tensors.values(), strict=True)]}
    assert check(net, "a.norm", tensors, before, expected, [], 0.5) < 1e-5
