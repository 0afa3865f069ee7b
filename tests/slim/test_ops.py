"""The operations of Slim UNet, each against the layer it stands for."""

import pytest
import torch
from comfyui_nibble.slim.operations import (
    ATTENTIONS,
    CONVOLUTIONS,
    Attention,
    Conv,
    flops,
    pool_area,
    pooled,
    relu_attention,
    run,
)
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

# in, out, stride, height, width: wide, narrow, halving, odd sizes
SHAPES = [(32, 48, 1, 9, 11), (48, 32, 1, 8, 8), (32, 32, 2, 9, 10), (40, 24, 2, 8, 7)]


def layer(i: int, o: int):
    g = torch.Generator().manual_seed(i * o)
    weight = torch.randn(o, i, 3, 3, generator=g) / (9 * i) ** 0.5
    return weight, torch.randn(o, generator=g)


def error(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", CONVOLUTIONS.values(), ids=lambda op: op.id)
def test_the_full_rank_is_the_convolution(op, shape):
    i, o, stride, h, w = shape
    weight, bias = layer(i, o)
    x = torch.randn(2, i, h, w, generator=torch.Generator().manual_seed(0))
    expected = functional.conv2d(x, weight, bias, stride, 1)
    stages = op.factor(weight, op.full(Conv(i, o, stride)), stride, 0)
    found = run(stages, x, bias)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("op", CONVOLUTIONS.values(), ids=lambda op: op.id)
def test_more_rank_is_closer(op):
    weight, _ = layer(32, 48)
    x = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = functional.conv2d(x, weight, padding=1)
    full = op.full(Conv(32, 48))
    errors = [error(run(op.factor(weight, r, 1, 0), x), expected) for r in (1, full // 3, full // 2, full - 1, full)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.5 > errors[-1]


@pytest.mark.parametrize("op", CONVOLUTIONS.values(), ids=lambda op: op.id)
def test_a_weight_that_is_of_low_rank_is_found(op):
    """The best product of thin factors: exact where the weight is one."""
    g = torch.Generator().manual_seed(1)
    if op.id == "low rank":
        weight = torch.einsum("rox,riy->oiyx", torch.randn(5, 24, 3, generator=g), torch.randn(5, 16, 3, generator=g))
    else:
        weight = torch.einsum("ko i,kiyx->oiyx".replace(" ", ""), torch.randn(2, 24, 16, generator=g),
                              torch.randn(2, 16, 3, 3, generator=g))  # fmt: skip
    x = torch.randn(1, 16, 6, 6, generator=g)
    expected = functional.conv2d(x, weight, padding=1)
    rank = 5 if op.id == "low rank" else 2
    assert error(run(op.factor(weight, rank, 1, 0), x), expected) < 1e-5
    assert error(run(op.factor(weight, rank - 1, 1, 0), x), expected) > 0.05


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("op", CONVOLUTIONS.values(), ids=lambda op: op.id)
def test_the_counter_finds_what_is_predicted(op, strength, shape):
    i, o, stride, h, w = shape
    weight, _ = layer(i, o)
    conv = Conv(i, o, stride, (h, w))
    x = torch.randn(1, i, h, w)
    stages = op.factor(weight, op.rank(conv, strength), stride, 0)
    with FlopCounterMode(display=False) as before:
        functional.conv2d(x, weight, stride=stride, padding=1)
    with FlopCounterMode(display=False) as after:
        run(stages, x)
    assert before.get_total_flops() == conv.flops
    assert after.get_total_flops() == flops(stages, (h, w)) == flops(op.shapes(conv, op.rank(conv, strength)), (h, w))
    assert after.get_total_flops() <= (1 - strength) * conv.flops


def attention(x, to, area=None, size=None):
    """Self-attention of 4 heads written out; ``area``: keys and values pooled."""
    source = x if area is None else pooled(x, size, area)
    q, k, v = x @ to[0], source @ to[1], source @ to[2]
    q, k, v = (t.unflatten(2, (4, -1)).transpose(1, 2) for t in (q, k, v))
    out = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1) @ v
    return out.transpose(1, 2).flatten(2) @ to[3]


@pytest.mark.parametrize("strength", [0.2, 0.6, 0.9])
def test_pooled_attention_saves_what_is_predicted(strength):
    size, width = (6, 7), 16
    x, to = torch.randn(1, 42, width), torch.randn(4, width, width)
    with FlopCounterMode(display=False) as before:
        attention(x, to)
    with FlopCounterMode(display=False) as after:
        attention(x, to, pool_area(strength), size)
    one = Attention(width, size)
    assert before.get_total_flops() == one.flops == ATTENTIONS["skip"].saved(one, strength)
    assert before.get_total_flops() - after.get_total_flops() == ATTENTIONS["pool"].saved(one, strength)


def test_pooling_averages_what_is_there():
    """A 3 x 3 map by 2 x 2, worked by hand: at the edges fewer values are averaged."""
    tokens = torch.arange(9.0).reshape(1, 9, 1)
    assert pooled(tokens, (3, 3), (2, 2)).flatten().tolist() == [2.0, 3.5, 6.5, 8.0]
    assert torch.equal(pooled(tokens, (3, 3), (1, 1)), tokens)
    assert [pool_area(s) for s in (0.1, 0.5, 0.51, 0.75, 0.76, 0.95)] == [
        (1, 2), (1, 2), (2, 2), (2, 2), (4, 4), (4, 4),
    ]  # fmt: skip


@pytest.mark.parametrize(("tokens", "keys"), [(5, 5), (1030, 7)])
def test_relu_attention_is_its_formula(tokens, keys):
    """relu(q k^T / sqrt d) v / n, head by head; also where the queries come in several parts."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, tokens, 12, generator=g)
    k, v = torch.randn(2, 2, keys, 12, generator=g)
    heads = [slice(i, i + 4) for i in (0, 4, 8)]
    expected = [torch.relu(q[..., c] @ k[..., c].mT / 4**0.5) @ v[..., c] / keys for c in heads]
    assert (relu_attention(q, k, v, 3) - torch.cat(expected, 2)).abs().max() <= 1e-5


def test_relu_attention_stays_finite_in_half_precision():
    q = torch.full((1, 4, 8), 20.0, dtype=torch.float16)
    k = torch.full((1, 4096, 8), 20.0, dtype=torch.float16)
    assert relu_attention(q, k, k, 1).isfinite().all()
