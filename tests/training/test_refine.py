"""Refinement: it starts as the kernel computes, its gradients are right, codes stay, and the output comes closer."""

from dataclasses import replace

import pytest
import torch
from comfyui_nibble.quant import kernels, svdquant
from comfyui_nibble.quant.modules import install, quantize_module
from comfyui_nibble.quant.policy import LayerPlan
from comfyui_nibble.quant.schemes import AWQ, SVDQUANT
from comfyui_nibble.training import loop, refine, tuned
from toys import flow_path, vp_path

PATH = vp_path()
PLANS = {
    "0": LayerPlan(SVDQUANT.id, "", 4),
    "2": LayerPlan(SVDQUANT.id, "", 4, act_unsigned=True),
    "4": LayerPlan(AWQ.id, ""),
}


class Net(torch.nn.Module):
    """(z, t, cond) -> x0 through two W4A4 layers, an AWQ one and a dense one."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64), torch.nn.SiLU(),
                torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64),
            )  # fmt: skip
        self.requires_grad_(False)

    def forward(self, z, t, cond):
        shift = torch.stack([torch.zeros(64) if c is None else c for c in cond])
        return self.layers(z.flatten(1) + shift).view(z.shape)


def four_bit(worse: float = 1.0) -> Net:
    """The net in 4 bits; ``worse``: with scales that are so much too large, which tuning must find out."""
    net = Net()
    quantize_module(net.layers, PLANS, torch.float32)
    for name in ("0", "2") if worse != 1 else ():
        layer = net.layers[int(name)]
        w = kernels.unwrap(layer.weight)
        install(layer, replace(w, wscales=w.wscales * worse), layer.bias, torch.float32)
    return net


@pytest.fixture(scope="module")
def prompts():
    g = torch.Generator().manual_seed(2)
    return [torch.randn(64, generator=g) for _ in range(24)], torch.zeros(64)


def walk(prompts, path=PATH, **more) -> refine.States:
    return refine.states(Net(), path, prompts, refine.Walk((1, 8, 8), **{"steps": 5, **more}))


def test_untouched_it_computes_what_the_kernel_does():
    net, z = four_bit(), torch.randn(5, 1, 8, 8)
    before = net(z, None, [None] * 5)
    with tuned.Tuner(net).attached():
        assert torch.allclose(net(z, None, [None] * 5), before, atol=1e-5)
    assert not any("forward" in layer.__dict__ for layer in net.layers)


def test_gradients_are_those_of_finite_differences():
    """Of the gain, by moving one scale; activations do not depend on it, so straight-through plays no part."""
    layer = four_bit().layers[2]
    one = tuned.Tuned(kernels.unwrap(layer.weight))
    x, v = torch.randn(9, 128), torch.randn(9, 64)
    (one(x) * v).sum().backward()
    for p, at in ((one.gain, (1, 7)), (one.down, (3, 2)), (one.up, (5, 1))):
        with torch.no_grad():
            p[at] += 0.5
            up = (one(x) * v).sum()
            p[at] -= 1.0
            down = (one(x) * v).sum()
            p[at] += 0.5
        assert float(p.grad[at]) == pytest.approx(float(up - down), rel=2e-3, abs=1e-3)


def test_gradients_of_awq_are_those_of_autograd():
    w = kernels.unwrap(four_bit().layers[4].weight)
    one = tuned.TunedAffine(w)
    x, v = torch.randn(9, 64, requires_grad=True), torch.randn(9, 64)
    (one(x) * v).sum().backward()
    gain, zero = (torch.zeros_like(w.wscales, requires_grad=True) for _ in range(2))
    again = x.detach().clone().requires_grad_()
    (again @ tuned._affine(w, gain, zero, torch.float32).t() * v).sum().backward()
    for got, expected in ((one.gain, gain), (one.zero, zero), (x, again)):
        assert torch.allclose(got.grad, expected.grad, rtol=1e-4, atol=1e-4)
    assert torch.equal(one.weight().wzeros, w.wzeros)


def test_the_inputs_gradient_is_straight_through():
    """That of the dense layer: codes times scales over smoothing, plus the branch."""
    w = kernels.unwrap(four_bit().layers[0].weight)
    x = torch.randn(6, 64, requires_grad=True)
    v = torch.randn(6, 128)
    (tuned.Tuned(w)(x) * v).sum().backward()
    assert torch.allclose(x.grad, v @ svdquant.dequantize(w), atol=1e-4)


def test_output_comes_closer_on_prompts_held_out_and_codes_stay(prompts):
    net, made = four_bit(worse=1.15), walk(prompts)
    codes = {n: kernels.unwrap(net.layers[int(n)].weight).qweight.clone() for n in PLANS}
    learn, held = (refine.of_prompts(made, rows) for rows in refine.split(prompts[0]))
    assert len(learn) == 3 * len(held) == 180
    tuner = tuned.Tuner(net)
    assert sorted(tuner.layers) == ["layers.0", "layers.2", "layers.4"]
    before = refine.measure(net, PATH, prompts, held)
    with tuner.attached():
        plan = loop.Plan("refine", 150, 16, 2e-3, warmup=10, weight_decay=0.0, ema=0.95)
        loop.train(plan, tuner.parameters(), refine.objective(net, PATH, prompts, learn, (16, "cpu")))
    for name, weight in tuner.weights().items():
        layer = net.get_submodule(name)
        assert torch.equal(weight.qweight, codes[name.split(".")[1]])
        install(layer, weight, layer.bias, torch.float32)
    after = refine.measure(net, PATH, prompts, held)
    assert after < 0.85 * before, (before, after)


def test_states_are_the_teachers_and_the_seeds(prompts):
    one, two, other = walk(prompts), walk(prompts), walk(prompts, seed=1)
    assert torch.equal(one.z, two.z) and not torch.equal(one.z, other.z)
    assert len(one) == 24 * 5 * 2 and set(one.row.tolist()) == {-1, *range(24)}
    assert len(walk(prompts, cfg=1.0)) == 24 * 5
    assert float(refine.output_error(Net(), PATH, prompts, one)) < 1e-9
    assert len(set(one.t.tolist())) > 50  # prompts have noise levels of their own


def test_flow_models_are_compared_by_velocity(prompts):
    """x0 off by 0.1 at sigma is a velocity off by 0.1 / sigma."""
    path = flow_path()
    made = walk(prompts, path)
    off = lambda z, t, cond: Net()(z, t, cond) + 0.1  # noqa: E731
    expected = (0.1 / path.sigma[made.t]).square().mean()
    assert float(refine.output_error(off, path, prompts, made)) == pytest.approx(float(expected), rel=1e-3)


def test_stopping_leaves_the_module_as_it_was(prompts):
    class Stop(BaseException):
        pass

    def check():
        raise Stop

    net = four_bit()
    before = net(torch.ones(1, 1, 8, 8), None, [None])
    with pytest.raises(Stop), tuned.Tuner(net).attached(check):
        net(torch.ones(1, 1, 8, 8), None, [None])
    assert torch.equal(net(torch.ones(1, 1, 8, 8), None, [None]), before)


def test_refuses_a_model_without_such_layers():
    with pytest.raises(ValueError, match="no svdquant_w4a4 layer"):
        tuned.Tuner(Net())
