"""Weights that no quantizer expects, in every target: the right values, or one sentence; never NaN."""

import math

import pytest
import torch
from comfyui_nibble.calibration import report
from comfyui_nibble.quant import awq, checks, core_formats, core_low_rank, datafree, kernels, modules
from comfyui_nibble.quant.calib import engine, presets
from comfyui_nibble.quant.calib.solve import Sample, solve
from comfyui_nibble.quant.policy import TARGETS, LayerPlan
from comfyui_nibble.quant.schemes import AWQ, KEEP
from comfyui_nibble.training import loftq

N, K = 64, 256
ALL = (*TARGETS, AWQ.id)
OWN = (TARGETS[0], AWQ.id)
DTYPES = (torch.bfloat16, torch.float16)


def weight(n: int = N) -> torch.Tensor:
    return torch.randn(n, K, generator=torch.Generator().manual_seed(0)) / 16


def dense(found) -> torch.Tensor:
    return kernels.dense(found if isinstance(found, torch.Tensor) else kernels.wrap(found)).float()


def made(target: str, w: torch.Tensor, dtype: torch.dtype = torch.bfloat16, preset: str = "fast"):
    """``w`` in ``target``, as calibration does it."""
    x = torch.randn(256, K, generator=torch.Generator().manual_seed(1))
    plan = LayerPlan(target, "", 0 if target != TARGETS[0] else 16)
    return solve(w, None, Sample(x, x.abs().amax(0)), plan, presets.preset(preset), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", ALL)
class TestOddWeights:
    def test_zeros_stay_zeros(self, target, dtype):
        solved = made(target, torch.zeros(N, K), dtype)
        assert torch.equal(dense(solved.weight), torch.zeros(N, K)) and solved.error == 0

    def test_a_constant_is_close_to_itself(self, target, dtype):
        found = dense(made(target, torch.full((N, K), 0.3), dtype).weight)
        assert (found / 0.3 - 1).abs().max() < 0.04

    def test_rows_and_groups_of_zeros_leave_the_others_as_good(self, target, dtype, sqnr):
        w = weight()
        whole = sqnr(w, dense(made(target, w, dtype).weight))
        w[0], w[1, :64] = 0, 0
        found = dense(made(target, w, dtype).weight)
        assert torch.isfinite(found).all() and sqnr(w, found) > whole - 1
        assert found[0].norm() < 0.05 * found[2].norm()

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_what_is_not_finite_is_refused(self, target, dtype, value):
        w = weight()
        w[3, 5] = value
        with pytest.raises(ValueError, match=r"^the weight holds NaN or infinity$"):
            made(target, w, dtype)

    def test_what_has_no_squares_is_refused(self, target, dtype):
        w = weight()
        w[3, 5] = 3e38
        with pytest.raises(ValueError, match=r"values, up to 3e\+38, are too large"):
            made(target, w, dtype)


@pytest.mark.parametrize("target", ALL)
def test_what_leaves_float16_is_refused(target):
    w = weight()
    w[3, 5] = 1e12
    with pytest.raises(ValueError, match=r"values, up to 1e\+12, leave the range of float16"):
        made(target, w, torch.float16)
    assert torch.isfinite(dense(made(target, w, torch.bfloat16).weight)).all()


@pytest.mark.parametrize("target", ALL)
def test_one_row(target, sqnr):
    w = weight(1)
    if target in OWN:
        assert sqnr(w, dense(made(target, w).weight)) > 18
    else:
        with pytest.raises(ValueError, match=f"{target} does not fit a layer of N=1, K=256"):
            made(target, w)


@pytest.mark.parametrize("small", [1e-3, 1e-5, 2e-7])
def test_small_weights_keep_their_digits_in_float16(small, sqnr):
    """nvfp4's scale of the whole tensor is chosen where it does not vanish: 1e-5 / 2688 is no float16."""
    w = (weight() * small / weight().abs().max()).half().float()
    assert sqnr(w, dense(core_formats.quantize(w, "nvfp4", torch.float16))) > 18


def test_regular_weights_have_kitchens_own_scale():
    from comfy_kitchen.tensor import QuantizedTensor

    for dtype in DTYPES:
        w = weight().to(dtype)
        own, theirs = core_formats.quantize(w, "nvfp4", dtype), QuantizedTensor.from_float(w, "TensorCoreNVFP4Layout")
        assert torch.equal(own._qdata, theirs._qdata) and torch.equal(own._params.scale, theirs._params.scale)


@pytest.mark.parametrize("quantize", [datafree.quantize, awq.quantize, lambda w: core_formats.quantize(
    w, "nvfp4", torch.bfloat16), lambda w: modules.quantize_weight(w, None, LayerPlan(AWQ.id, ""), torch.bfloat16),
    lambda w: loftq.solve(w, LayerPlan(AWQ.id, ""), 4, torch.bfloat16)])  # fmt: skip
def test_every_way_in_refuses(quantize):
    w = weight()
    w[0, 0] = math.inf
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        quantize(w)


@pytest.mark.parametrize("target", OWN)
@pytest.mark.parametrize("w", [torch.zeros(N, K), torch.full((N, K), 0.3), weight(1)], ids=["zero", "constant", "row"])
def test_loftq_of_odd_weights(target, w):
    found = loftq.solve(w, LayerPlan(target, "", 8), 4, torch.float16)
    whole = dense(found.weight) + found.up.float() @ found.down.float()
    assert (whole - w).norm() <= 1e-3 * w.norm()


def test_layers_are_named():
    """By calibration, and by a whole module's quantization."""
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(K, N), "b": torch.nn.Linear(K, N)})
    module.b.weight.data[0, 0] = 1e12
    plans = {n: LayerPlan(TARGETS[0], "", 8) for n in module}
    job = engine.Job(plans, presets.preset("data_free"), torch.float16, lambda: None,
                     lambda n: (module[n].weight.detach(), None))  # fmt: skip
    for run in (lambda: engine.calibrate(module, job), lambda: modules.quantize_module(module, plans, torch.float16)):
        with pytest.raises(ValueError, match=r"^layer b: the weight's values, up to 1e\+12, leave"):
            run()


# ---- activations ----


def test_an_nvfp4_layer_gives_zeros_for_zeros(monkeypatch):
    """Measured, and with a branch beside it where there is a kernel (here: its numbers): zeros have no scale."""
    w, x = weight(), torch.zeros(32, K)
    q = core_formats.quantize(w, "nvfp4", torch.bfloat16)
    assert core_formats.output_error(x, w, q) == 0
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda a, b, bias: linear(a.dequantize(), b.dequantize(), bias))
    assert torch.equal(core_low_rank.base_linear(x.bfloat16(), core_low_rank.beside(q), None).float(), x[:, :N])


def tokens(kind: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(256, K, generator=g)
    one = x[:1].expand_as(x)
    return {
        "equal": one.clone(), "constant": torch.full_like(x, 0.5), "nearly equal": one + 1e-4 * x,
        "rounded": (one * (1 + 2.0**-10 * x)).bfloat16().float(), "zeros": torch.zeros_like(x),
    }[kind]  # fmt: skip


KINDS = ("equal", "constant", "nearly equal", "rounded", "zeros")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ALL)
def test_equal_tokens_have_an_error_of_their_size(target, kind):
    """Of ||y||^2, for there is no spread: a 4-bit layer's is some percent, and was 1e4 to 1e12."""
    w, x = weight(), tokens(kind)
    plan = LayerPlan(target, "", 16 if target == TARGETS[0] else 0)
    solved = solve(w, None, Sample(x, x.abs().amax(0)), plan, presets.preset("fast"), torch.bfloat16)
    y = x @ w.t()
    got = torch.nn.functional.linear(x.bfloat16(), solved.weight if isinstance(solved.weight, torch.Tensor) else
                                     kernels.wrap(solved.weight))  # fmt: skip
    whole = float((got.float() - y).square().sum() / y.square().sum().clamp(min=1e-30))
    assert solved.error <= 0.05 and solved.data_free <= 0.05
    assert 0.2 * whole - 1e-4 <= solved.error <= 5 * whole + 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tokens_promote_no_layer(kind):
    layer, x = torch.nn.Linear(K, N), tokens(kind)
    layer.weight.data = weight()
    module = torch.nn.ModuleDict({"a": layer})
    plan = {"a": LayerPlan(TARGETS[0], "", 16)}
    job = engine.Job(plan, presets.preset("fast"), torch.bfloat16, lambda: layer(x), lambda n: (layer.weight.detach(),
                     None))  # fmt: skip
    found = engine.calibrate(module, job)["a"]
    assert found.plan.scheme == TARGETS[0] != KEEP and found.solved.error <= 0.05
    assert report.outcome(found) in ("calibrated", "data-free")


def test_relative_error_by_hand():
    """y = 1, 3 has mean 2 and spread 2; missed by 1 each: 2 / 2. One row and equal rows: of the square."""
    y, one = torch.tensor([[1.0], [3.0]]), torch.tensor([[3.0]])
    assert checks.relative_error(y + 1, y) == 1
    assert checks.relative_error(one + 1, one) == pytest.approx(1 / 9)
    assert checks.relative_error(torch.full((4, 1), 4.0), torch.full((4, 1), 3.0)) == pytest.approx(1 / 9)
    assert checks.relative_error(y, y) == checks.relative_error(y * 0, y * 0) == 0
    assert math.isnan(checks.relative_error(y, y * 0))
    offset = 100 + torch.randn(64, 8, generator=torch.Generator().manual_seed(0))  # a spread of 1e-4: it counts
    assert checks.relative_error(offset + 1, offset) > 0.5
