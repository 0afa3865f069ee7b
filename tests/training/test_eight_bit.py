"""Frozen weights held in 8 bits: what a layer computes meanwhile, its gradient, and that nothing is left of it."""

import copy

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfyui_nibble.quant.modules import quantize_module
from comfyui_nibble.quant.policy import LayerPlan
from comfyui_nibble.quant.schemes import SVDQUANT
from comfyui_nibble.training import adapters, eight_bit
from torch import nn

SHAPES = [
    (nn.Conv2d(6, 10, 3, padding=1), (2, 6, 9, 7)),
    (nn.Conv2d(6, 10, 3, stride=2, padding=(1, 0), dilation=2), (2, 6, 12, 11)),
    (nn.Conv2d(6, 12, 1, groups=3, bias=False), (2, 6, 5, 5)),
    (nn.Conv1d(6, 8, 5, padding=2), (2, 6, 20)),
    (nn.Linear(24, 10), (3, 7, 24)),
    (nn.Linear(24, 10, bias=False), (3, 24)),
]


class Net(nn.Module):
    """A 4-bit linear between a convolution and a dense one."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.conv = nn.Conv2d(4, 64, 3, padding=1)
        self.attn = nn.ModuleDict({"to_q": nn.Linear(64, 64), "to_out": nn.Linear(64, 64)})
        self.requires_grad_(False).to(dtype)
        quantize_module(self, {"attn.to_q": LayerPlan(SVDQUANT.id, "", 4)}, dtype)

    def forward(self, x):
        return self.attn["to_out"](self.attn["to_q"](self.conv(x).flatten(2).mT))


def held(layer: nn.Module):
    """``layer`` in a module of its own, as `in_8_bits` wants it."""
    return nn.ModuleDict({"layer": copy.deepcopy(layer).requires_grad_(False)})


@pytest.mark.parametrize("layer, shape", SHAPES, ids=str)
def test_output_and_gradient_are_those_of_the_rounded_weight(layer, shape):
    module, x = held(layer), torch.randn(shape, requires_grad=True)
    rounded = copy.deepcopy(module["layer"])
    weight = module["layer"].weight
    rounded.weight.data = eight_bit.rounded(weight).dequantize().view(weight.shape)
    off = (rounded.weight - weight).flatten(1).abs().amax(1) / weight.flatten(1).abs().amax(1)
    assert 0 < float(off.max()) < 0.5 / 127 * 1.01
    wanted = rounded(x)
    v = torch.randn_like(wanted)
    (gradient,) = torch.autograd.grad((wanted * v).sum(), x)
    with eight_bit.in_8_bits(module) as layers:
        assert layers == 1
        got = module["layer"](x)
        (own,) = torch.autograd.grad((got * v).sum(), x)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own, gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_afterwards_it_is_what_it_was(dtype):
    net = Net(dtype)
    before, parameters = {n: t.clone() for n, t in net.conv.state_dict().items()}, list(net.parameters())
    with eight_bit.in_8_bits(net):
        assert net.conv.weight._qdata.element_size() == net.attn["to_out"].weight._qdata.element_size() == 1
        assert net.conv(torch.randn(1, 4, 8, 8, dtype=dtype)).dtype == dtype
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert all(torch.equal(t, before[n]) for n, t in net.conv.state_dict().items())
    assert not any("forward" in m.__dict__ for m in net.modules())


def test_whatever_is_raised_it_is_put_back():
    class Stop(BaseException):
        pass

    net = Net()
    before = net.conv.weight.clone()
    with pytest.raises(Stop), eight_bit.in_8_bits(net):
        raise Stop
    assert torch.equal(net.conv.weight, before)


def test_moved_meanwhile_the_module_gets_its_weights_back_where_they_were():
    net = Net()
    own = net.conv.weight
    with eight_bit.in_8_bits(net):
        net.to("meta")
        assert net.conv.weight.device.type == "meta"
    assert net.conv.weight is own and own.device.type == "cpu"


def test_two_layers_of_one_weight():
    net = Net()
    net.second = nn.Conv2d(4, 64, 3)
    net.second.weight = own = net.conv.weight
    with eight_bit.in_8_bits(net) as layers:
        x = torch.randn(1, 4, 8, 8)
        torch.testing.assert_close(net.second(x), nn.functional.conv2d(x, own, net.second.bias), atol=2e-2, rtol=0)
    assert layers == 3 and net.second.weight is own and net.conv.weight is own


def test_all_but_some():
    net = Net()
    with eight_bit.in_8_bits(net, {"conv"}) as layers:
        assert layers == 1 and not isinstance(net.conv.weight, QuantizedTensor)


def test_what_is_left_alone():
    """Convolutions with another border or a weight that is changed on its way, and every quantized layer."""
    net = Net()
    assert set(eight_bit.holdable(net)) == {"conv", "attn.to_out"}
    net.conv.weight_function = [lambda w: w]
    net.attn["to_out"].weight.data = net.attn["to_out"].weight.data.to(torch.float8_e4m3fn)
    assert not eight_bit.holdable(net)
    odd = nn.ModuleList([nn.Conv2d(2, 2, 3, padding_mode="circular"), nn.Conv2d(2, 2, 3, padding="same")])
    assert not eight_bit.holdable(odd)


def test_only_of_a_quantized_model_that_asks_for_it():
    plain = nn.Sequential(nn.Conv2d(4, 4, 3))
    for module, asked, expected in ((Net(), True, 2), (Net(), False, 0), (plain, True, 0)):
        with eight_bit.wanted(module, asked) as layers:
            assert layers == expected


def test_loras_train_on_it_and_nothing_is_kept_of_a_convolution():
    net, x = Net(), torch.randn(2, 4, 8, 8)
    loras, kept = adapters.Adapters(net, ["attn.to_q", "attn.to_out"], 4), []
    watching = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t)
    with eight_bit.in_8_bits(net), loras.attached(), watching:
        net(x).square().mean().backward()
    assert all(bool(f.up.grad.any()) for f in loras.factors.values())
    assert torch.Size((64, 4, 3, 3)) not in kept and x.shape not in kept
