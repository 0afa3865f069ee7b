"""The simulation against hand formulas and against what real tensors take."""

import pytest
import torch
from comfyui_nibble.profiling import work
from torch import nn
from torch.nn import functional

B, T, D, HEADS = 2, 48, 64, 4


class Block(nn.Module):
    """Linear, attention, linear: everything the hand formulas need."""

    def __init__(self, device=None):
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D, device=device)
        self.out = nn.Linear(D, D, device=device)

    def forward(self, x):
        q, k, v = (t.reshape(B, -1, HEADS, D // HEADS).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Unet(nn.Module):
    """Convolutions with a skip connection that must stay alive."""

    def __init__(self, device=None):
        super().__init__()
        self.a = nn.Conv2d(4, 16, 3, padding=1, device=device)
        self.b = nn.Conv2d(16, 32, 3, stride=2, padding=1, device=device)
        self.c = nn.Conv2d(48, 4, 3, padding=1, device=device)

    def forward(self, x):
        skip = functional.silu(self.a(x))
        deep = functional.interpolate(functional.gelu(self.b(skip)), scale_factor=2)
        return self.c(torch.cat([skip, deep], 1)).add_(1)


def shapes(size):
    return {Block: (B, T * size, D), Unet: (B, 4, 16 * size, 16 * size)}


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, device="meta", dtype=dtype)


@pytest.mark.parametrize("attention", work.KINDS)
def test_flops_by_hand(attention):
    """Two multiply-adds a weight and token, and 4 T^2 d of attention a row."""
    model, x = Block("meta"), empty(B, T, D)
    found = work.simulate(model, lambda: model(x), attention)
    linear = {"qkv": 2 * B * T * D * 3 * D, "out": 2 * B * T * D * D}
    assert found.layers == linear
    assert found.flops == sum(linear.values()) + 4 * B * T * T * D


@pytest.mark.parametrize("kind", [Block, Unet])
@pytest.mark.parametrize("size", [1, 3])
def test_live_bytes_are_those_of_a_real_run(kind, size):
    """To the byte: the same code frees the same tensors at the same places."""
    ghost, real = kind("meta"), kind()
    shape = shapes(size)[kind]
    x, y = empty(*shape), torch.randn(shape)
    with torch.no_grad():
        expected = work.measure(lambda: real(y))
    assert work.simulate(ghost, lambda: ghost(x)).live == expected > 0


def test_live_bytes_by_hand():
    """x -> relu (new) -> two more of the size, the first freed in between: two at once."""

    class Chain(nn.Module):
        def forward(self, x):
            return functional.relu(functional.relu(functional.relu(x)))

    x = empty(1000)
    assert work.simulate(Chain(), lambda: Chain()(x)).live == 2 * 4000


def test_views_and_in_place_results_take_nothing():
    class Views(nn.Module):
        def forward(self, x):
            return x.view(10, 100).t().add_(1)[0]

    x = empty(1000)
    assert work.simulate(Views(), lambda: Views()(x)).live == 0


def test_stored_scores_take_the_square_of_the_tokens():
    model = Block("meta")
    few, many = empty(B, T, D), empty(B, 8 * T, D)
    fused = [work.simulate(model, lambda x=x: model(x)).live for x in (few, many)]
    matrix = [work.simulate(model, lambda x=x: model(x), work.MATRIX).live for x in (few, many)]
    assert fused[1] == 8 * fused[0]
    scores = B * HEADS * (8 * T) ** 2 * 4
    assert matrix[1] >= 2 * scores and matrix[1] > fused[1]


def test_half_precision_takes_half():
    model, half = Unet("meta"), Unet("meta").half()
    x, y = empty(B, 4, 16, 16), empty(B, 4, 16, 16, dtype=torch.float16)
    full = work.simulate(model, lambda: model(x))
    assert work.simulate(half, lambda: half(y)).live * 2 == full.live
    assert work.simulate(half, lambda: half(y)).flops == full.flops


def test_a_real_model_is_not_simulated():
    model = Block()
    with pytest.raises(ValueError, match="meta device"):
        work.simulate(model, lambda: model(torch.zeros(B, T, D)))
    with pytest.raises(ValueError, match="fused or matrix"):
        work.simulate(Block("meta"), lambda: None, "flash")


def test_hooks_are_gone_afterwards():
    model, x = Block("meta"), empty(B, T, D)
    work.simulate(model, lambda: model(x))
    with pytest.raises(ZeroDivisionError):
        work.simulate(model, lambda: 1 / 0)
    assert all(not m._forward_hooks for m in model.modules())
