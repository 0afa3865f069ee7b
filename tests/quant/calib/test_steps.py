"""Each step of the solver against what it claims to compute."""

import math

import pytest
import torch
from comfyui_nibble.quant import scales
from comfyui_nibble.quant.calib import gptq, low_rank, presets, smooth
from comfyui_nibble.quant.calib.observe import Reservoir, limit_for

from .layers import published, synthetic


class TestReservoir:
    def test_batches_do_not_matter(self):
        x = torch.randn(1000, 8).bfloat16().float()
        one, many = Reservoir(8, 100, 3), Reservoir(8, 100, 3)
        one.add(x)
        for part in x.split(37):
            many.add(part)
        assert torch.equal(one.tokens(), many.tokens()) and torch.equal(one.maxima, many.maxima)
        assert one.seen == many.seen == 1000 and len(one.tokens()) == 100

    def test_every_token_is_as_likely(self):
        counts = torch.zeros(50)
        for seed in range(400):
            r = Reservoir(1, 10, seed)
            for i in range(50):
                r.add(torch.full((1, 1), float(i)))
            counts[r.tokens().long().flatten()] += 1
        assert counts.mean() == 80 and counts.std() < 14  # binomial: 8

    def test_maxima_are_over_all_tokens_and_memory_is_bounded(self):
        r = Reservoir(4, 16, 0)
        for i in range(1000):
            r.add(torch.full((2, 3, 4), float(i)))
        assert (r.maxima == 999).all() and r.nbytes == 16 * 4 * 2 + 16

    def test_broken_tokens_are_left_out(self):
        r = Reservoir(4, 16, 0)
        x = torch.ones(3, 4)
        x[1, 2] = float("nan")
        r.add(x)
        assert len(r.tokens()) == 2 and (r.maxima == 1).all()

    def test_a_layer_gets_what_its_width_can_use(self):
        assert [limit_for(k, 4096) for k in (64, 768, 3072)] == [1024, 1536, 4096]


class TestSmooth:
    def test_gradient_is_the_surrogates(self):
        w, x = synthetic(32, 128, 64)
        for shift, qmax in ((0.0, 7), (0.171875, 15)):
            logs = (0.3 * torch.randn(128)).double()
            _, gradient = smooth.Surrogate(x, w, shift, qmax).gradient(logs.exp().float())
            exact = smooth.Surrogate(x.double(), w.double(), shift, qmax)
            for i in range(0, 128, 11):
                step = torch.zeros(128, dtype=torch.float64)
                step[i] = 1e-6
                up, down = ((logs + d).exp() for d in (step, -step))
                slope = math.log(exact.value(up) / exact.value(down)) / 2e-6
                assert abs(slope - float(gradient[i])) < 1e-3 * float(gradient.abs().max())

    def test_search_and_learning_lower_it(self):
        w, x = synthetic(256, 256, 512)
        surrogate = smooth.Surrogate(x, w, 0.0, 7)
        plain = surrogate.value(torch.ones(256))
        found = smooth.search(x, w, x.abs().amax(0), 0.0, 7)
        learned = smooth.learn(found, x, w, 0.0, 7, 30)
        assert surrogate.value(learned) < 0.95 * surrogate.value(found) < 0.5 * plain

    def test_it_predicts_the_real_error(self):
        """The closed form ranks smoothing factors as rounding really does."""
        w, x = synthetic(256, 256, 1024)
        surrogate, y = smooth.Surrogate(x, w, 0.0, 7), x @ w.t()
        predicted, real = [], []
        for s in smooth.candidates(x.abs().amax(0), w.abs().amax(0)):
            codes, steps = scales.search(w * s, dtype=torch.float32)
            dense = (codes.float().reshape(256, -1, 64) * steps.t().unsqueeze(-1)).reshape(256, 256)
            predicted.append(surrogate.value(s))
            real.append(float((scales.rounded(x / s, 7) @ dense.t() - y).square().sum()))
        ranks = [torch.tensor(v).argsort().argsort().float() for v in (predicted, real)]
        assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.85

    def test_factors_are_safe_in_fp16(self):
        amax = torch.logspace(-12, 12, 128)
        for s in smooth.candidates(amax, torch.ones(128)):
            assert torch.isfinite(s.half()).all() and (s.half() > 0).all()
            assert torch.allclose(s.log().reshape(-1, 64).mean(-1), torch.zeros(2), atol=1e-4)

    def test_dead_channels_stay(self):
        w, x = synthetic(64, 128, 256)
        x[:, 5] = 0
        assert smooth.search(x, w, x.abs().amax(0), 0.0, 7)[5] == 1


class TestLowRank:
    def test_refit_is_the_best_in_the_outputs(self):
        """Against the exact answer by a full SVD of the residual outputs."""
        _, x = synthetic(96, 128, 512)
        missed = 0.1 * torch.randn(96, 128)
        gram = x.t() @ x
        up, down = low_rank.refit(missed, gram, 16, 0)
        left = (x @ (missed - up @ down.t()).t()).square().sum()
        u, s, _ = torch.linalg.svd(missed @ x.t(), full_matrices=False)
        assert left < 1.03 * s[16:].square().sum()
        assert left < 0.8 * (x @ (missed - u[:, :0] @ down[:, :0].t()).t()).square().sum()

    def test_shrinking(self):
        gram = torch.randn(8, 8)
        gram = gram @ gram.t()
        assert torch.allclose(low_rank.shrunk(gram, 1.0), torch.diag(gram.diagonal()))
        assert torch.equal(low_rank.shrunk(gram, 0.0), gram)

    def test_balancing_keeps_the_product(self):
        up, down = 1e-4 * torch.randn(32, 4), 1e5 * torch.randn(64, 4)
        a, b = low_rank.balanced(up, down)
        assert torch.allclose(a @ b.t(), up @ down.t(), rtol=1e-4, atol=1e-4)
        assert torch.allclose(a.norm(dim=0), b.norm(dim=0), rtol=1e-4)

    def test_rank_zero(self):
        up, down = low_rank.truncated(torch.randn(8, 16), 0, 0)
        assert (up @ down.t()).shape == (8, 16) and not (up @ down.t()).any()


class TestGPTQ:
    def test_beats_rounding_in_its_own_metric(self):
        w, x = synthetic(128, 256, 2048)
        gram = x.t() @ x
        codes, steps = scales.search(w, dtype=torch.float32)
        better = gptq.codes(w, steps, gptq.inverse_factor(gram, 0.0, 0.01))
        error = {}
        for name, q in (("nearest", codes), ("gptq", better)):
            dense = (q.float().reshape(128, -1, 64) * steps.t().unsqueeze(-1)).reshape(128, 256)
            error[name] = float((x @ (dense - w).t()).square().sum())
        assert error["gptq"] < 0.5 * error["nearest"]
        assert better.min() >= -8 and better.max() <= 7 and better.dtype == torch.int8

    def test_a_diagonal_hessian_is_plain_rounding(self):
        w = torch.randn(64, 128)
        codes, steps = scales.search(w, dtype=torch.float32)
        factor = gptq.inverse_factor(torch.diag(torch.rand(128) + 0.5), 0.0, 0.01)
        assert torch.equal(gptq.codes(w, steps, factor), codes)

    def test_a_singular_hessian_is_damped(self):
        x = torch.randn(4, 128)
        x[:, 7] = 0
        factor = gptq.inverse_factor(x.t() @ x, 0.3, 1e-6)
        assert factor is not None and torch.isfinite(factor[1]).all()


def test_published_iterations_never_raise_the_error():
    w, x = synthetic(96, 128, 512)
    s, y = torch.ones(128), x @ w.t()
    branch = low_rank.truncated(w, 8, 0)

    def error(up, down):
        return float((x @ (scales.rounded(w - up @ down.t(), 7) + up @ down.t()).t() - y).square().sum())

    assert error(*published.iterate(w, s, branch, x, 0, rounds=20)) < error(*branch)


@pytest.mark.parametrize("row", presets.PRESETS.values(), ids=lambda p: p.id)
def test_every_preset_row_is_explained(row):
    assert row.summary and presets.preset(row.id) is row
    assert row.needs_data == (row.smoothing != "none" or row.gptq or bool(row.refits))


def test_unknown_presets_list_what_there_is():
    with pytest.raises(ValueError, match=r"unknown preset 'x'; there are data_free, fast, best"):
        presets.preset("x")
    with pytest.raises(ValueError, match="unknown smoothing 'magic'"):
        presets.Preset("x", "", smoothing="magic")
