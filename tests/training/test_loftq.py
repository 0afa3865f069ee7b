"""LoftQ: the sum of 4-bit weight and LoRA comes closer with every round, and closer than the two plain ways."""

from dataclasses import replace

import pytest
import torch
from comfyui_nibble import demo
from comfyui_nibble.checkpoints.convert import plan_source
from comfyui_nibble.checkpoints.source import open_source
from comfyui_nibble.profiling.work import LiveBytes
from comfyui_nibble.quant import awq, parts
from comfyui_nibble.quant.packing import unpack_signed
from comfyui_nibble.quant.policy import LayerPlan
from comfyui_nibble.quant.schemes import AWQ, KEEP, SVDQUANT
from comfyui_nibble.training import loftq

EVERY = 7  # of the demo's 70 layers; all of them in benchmarks/distill.py
PLANS = [
    LayerPlan(SVDQUANT.id, "", 0),
    LayerPlan(SVDQUANT.id, "", 8),
    LayerPlan(SVDQUANT.id, "", 8, act_unsigned=True),
    LayerPlan(AWQ.id, ""),
]


def total(x: loftq.Initialised) -> torch.Tensor:
    return parts.dequantize(x.weight) + x.up.float() @ x.down.float()


def weight(n: int = 96, k: int = 192, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g) * torch.logspace(0, -1, k)


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.scheme}-{p.rank}-{p.act_unsigned}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_falls_and_is_that_of_what_is_returned(plan, dtype):
    w = weight()
    x = loftq.solve(w, plan, 8, dtype)
    assert all(late < early for early, late in zip(x.errors, x.errors[1:], strict=False))
    assert x.error == pytest.approx(float((total(x) - w).norm() / w.norm()), rel=1e-4)
    assert x.error < x.residual < x.quantized
    assert x.down.shape == (8, 192) and x.up.shape == (96, 8) and x.down.dtype == dtype
    assert x.weight.rank == (plan.rank if plan.scheme == SVDQUANT.id else 0)


def test_codes_are_kept_where_new_ones_are_worse():
    """The second quantization of a slightly moved target, by hand: each group has the smaller of the two errors."""
    w = weight()
    old = loftq._svdquant(w, torch.float16, None)
    target = w + 0.003 * weight(seed=1)
    new, joined = loftq._svdquant(target, torch.float16, None), loftq._svdquant(target, torch.float16, old)
    least = torch.minimum(loftq._by_group(new.dense - target), loftq._by_group(old.dense - target))
    assert torch.equal(loftq._by_group(joined.dense - target), least)
    assert not torch.equal(joined.dense, new.dense) and not torch.equal(joined.dense, old.dense)


def test_awq_groups_are_kept_with_their_bytes():
    w = weight()
    old = loftq._awq(w, torch.float16, None)
    joined = loftq._awq(w + 0.003 * weight(seed=1), torch.float16, old)
    assert torch.equal(awq.dequantize(awq.AWQWeight(*joined.parts)), joined.dense)


def test_same_weight_same_result():
    one, two = (loftq.solve(weight(), PLANS[1], 4, torch.float16, 2) for _ in range(2))
    assert torch.equal(one.up, two.up) and torch.equal(one.weight.qweight, two.weight.qweight)


def test_beats_quantizing_and_the_svd_of_the_residual_on_demo_layers():
    with open_source(demo.MODEL) as source:
        plans = {n: p for n, p in plan_source(source, 16).items() if p.scheme != KEEP}
        done = {n: loftq.solve(source.get(f"{n}.weight"), plans[n], 16, torch.float16) for n in list(plans)[::EVERY]}
    assert len(done) == 10
    for name, x in done.items():
        assert x.error < 0.95 * x.residual and x.residual < x.quantized, name
        assert int(unpack_signed(x.weight.qweight).min()) >= -8
    text = loftq.table(done)
    assert text.startswith("10 layers, mean weight error") and all(n in text for n in done)


@pytest.mark.parametrize(
    ("change", "rank", "words"),
    [(dict(), 0, "rank 1 or more"), (dict(scheme=KEEP), 4, "LoftQ knows"), (None, 4, "NaN")],
)
def test_refuses(change, rank, words):
    w = weight() if change is not None else weight() * torch.nan
    with pytest.raises(ValueError, match=words):
        loftq.solve(w, replace(PLANS[0], **(change or {})), rank, torch.float16)


@pytest.mark.parametrize("plan", PLANS[1:], ids=lambda p: p.scheme)
@pytest.mark.parametrize(("n", "k"), [(512, 512), (1024, 256), (192, 1024)])
def test_peak_memory_stays_under_the_stated_bound(n, k, plan):
    with LiveBytes() as count:
        loftq.solve(weight(n, k), plan, 16, torch.bfloat16, 3)
    assert 8 * n * k < count.peak <= loftq.working_bytes(n, k)


def test_a_stop_is_heard_in_every_round():
    asked = []
    x = loftq.solve(weight(), PLANS[1], 8, torch.float16, 4, lambda: asked.append(1))
    assert len(asked) >= len(x.errors) > 1
    with pytest.raises(KeyboardInterrupt):
        loftq.solve(weight(), PLANS[1], 8, torch.float16, 4, _stop)


def _stop():
    raise KeyboardInterrupt
